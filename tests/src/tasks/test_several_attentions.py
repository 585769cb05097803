"""`eval.attentions`: the results of runs of their own, each image decoded once, and everything that can be refused."""

from __future__ import annotations

import json
import logging
import re

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import src.datamodules.dataset as dataset
import src.distributed.trainer as trainer_module
from scatterbrain.attention import ATTENTIONS
from scatterbrain.errors import UserError
from src.checkpoints import load_checkpoint
from src.evaluation.results import read_results
from src.models.inference import InferenceT2TViT
from src.models.t2t_vit import T2TViT, create_t2t_vit
from src.tasks.attention_configs import attention_configs
from src.tasks.classification_evaluation import SeededClassifier
from src.tasks.device_time import DeviceTime
from src.tasks.evaluate import evaluate
from src.tasks.forward import share_modules
from tests.src.tasks.conftest import NUM_IMAGES
from tests.src.tasks.setup import EXPERIMENT, IMAGE_SIZE, NUM_CLASSES, compose_config, make_checkpoint, overrides
from tests.src.tasks.test_evaluate import SYNTHETIC, NoWaiting

NAMES = ["full", "local", "performer", "sblocal"]
# what differs between two evaluations of the same
MEASURED = {"images_per_second", "seconds", "command", "one_pass"}


def listed(names: list[str]) -> str:
    return f"[{','.join(names)}]"


def read_figures(folder) -> dict:
    figures = json.loads((folder / "results.json").read_text())
    return {name: value for name, value in figures.items() if name not in MEASURED}


def read_metrics(folder) -> tuple[str, list[float]]:
    """Header and line of the csv logger."""
    header, line = (folder / "csv" / "metrics.csv").read_text().splitlines()
    return header, [float(value) for value in line.split(",")]


@pytest.fixture
def together(evaluation):
    """`together(names, folder="together", **changes)`: what an evaluation of several attentions returns."""

    def run(names=NAMES, folder: str = "together", **changes):
        return evaluate(evaluation("t2t_vit_t_14", folder, eval__attentions=listed(names), **changes))

    return run


@pytest.mark.parametrize("fast", ["on", "off"])
def test_each_attention_has_the_files_of_a_run_of_its_own_and_images_are_decoded_once(
    together, evaluation, monkeypatch, tmp_path, fast
):
    decoded = []
    decode = dataset.load_rgb
    monkeypatch.setattr(dataset, "load_rgb", lambda path, *limits: decoded.append(path.name) or decode(path, *limits))
    options = {"eval__num_seeds": 2, "model__fast": fast}
    results, objects = together(**options)
    assert sorted(decoded) == [f"{index:03}.png" for index in range(NUM_IMAGES)]
    assert [result.attention for result in results] == NAMES
    for number, name in enumerate(NAMES):
        evaluate(evaluation("t2t_vit_t_14", name, model___t2tattn_cfg=name, **options))
        ours, alone = tmp_path / "together" / str(number), tmp_path / name
        assert read_figures(ours) == read_figures(alone)
        assert (ours / "predictions.csv").read_bytes() == (alone / "predictions.csv").read_bytes()
        (header, figures), (expected_header, expected) = map(read_metrics, (ours, alone))
        assert header == expected_header
        assert figures == pytest.approx(expected, rel=1e-6)  # Lightning rounds to float32
        assert results[number].images_per_second > 0
    # their figures differ, or equality would say nothing
    assert len({result.loss for result in results}) == len(NAMES)
    assert [len(result.seeds) for result in results] == [1, 1, 2, 2]
    assert not (tmp_path / "together" / "results.json").exists()
    assert objects.task.seconds >= sum(objects.task.seconds_of) > 0


def test_the_configuration_of_each_is_in_its_folder(together, tmp_path):
    together(["local", "sblocal"], **{"++model__t2tattn1_cfg__local_context": 7})
    for number, name in enumerate(["local", "sblocal"]):
        config = OmegaConf.load(tmp_path / "together" / str(number) / ".hydra" / "config.yaml")
        assert (config.model.t2tattn1_cfg.name, config.model.t2tattn1_cfg.local_context) == (name, 7)
        assert config.paths.output_dir == str(tmp_path / "together" / str(number))


def test_the_comparison_describes_the_pass(together, tmp_path):
    _, objects = together(eval__num_seeds=2)
    comparison = json.loads((tmp_path / "together" / "comparison.json").read_text())
    assert [row["run"] for row in comparison["runs"]] == ["0", "1", "2", "3"]
    expected = {"attentions": 4, "forward_passes": 6, "seconds": objects.task.seconds, "peak_memory_mib": None}
    assert comparison["one_pass"] == expected
    assert read_results(tmp_path / "together" / "3").one_pass == expected
    text = (tmp_path / "together" / "comparison.md").read_text()
    assert f"one pass over {NUM_IMAGES} images with 4 attentions (6 forward passes of each image) took" in text
    assert (tmp_path / "together" / "comparison.png").stat().st_size > 0


@pytest.mark.parametrize(("batch_size", "timed"), [(4, NUM_IMAGES - 4), (NUM_IMAGES, NUM_IMAGES)])
def test_the_rate_is_that_of_its_own_forward_passes_after_the_first_batch(together, batch_size, timed):
    results, objects = together(["full", "sblocal"], eval__num_seeds=3, datamodule__batch_size=batch_size)
    for result, num_seeds, seconds in zip(results, (1, 3), objects.task.seconds_of, strict=True):
        assert result.seconds == seconds
        assert result.images_per_second == pytest.approx(timed * num_seeds / result.seconds, rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {"eval__attentions": "[]"}, {"eval__attentions": "null"}])
def test_none_is_a_single_run(evaluation, tmp_path, changes):
    results, _ = evaluate(evaluation("t2t_vit_t_14", **changes))
    assert results.attention == "full"
    assert (tmp_path / "run" / "results.json").exists()
    assert not (tmp_path / "run" / "comparison.json").exists()


def storages(module: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in [*module.parameters(), *module.buffers()] if tensor.numel()}


@pytest.mark.parametrize("fast", ["on", "off"])
def test_weights_are_in_memory_once(together, monkeypatch, fast):
    evaluated = []
    start = SeededClassifier.start

    def record(self, *arguments):
        start(self, *arguments)
        evaluated.append((self.model, self._forward))

    monkeypatch.setattr(SeededClassifier, "start", record)
    together(model__fast=fast)
    for index in (0, 1):  # the models, and what is evaluated in their place
        first = storages(evaluated[0][index])
        assert first
        for pair in evaluated[1:]:
            attentions = set().union(*map(storages, pair[0].token_attentions))
            assert storages(pair[index]) - attentions == first
    assert isinstance(evaluated[0][1], InferenceT2TViT) == (fast == "on")
    # the rows of each attention are its own
    performer, sblocal = (storages(evaluated[number][0].token_attentions[0]) for number in (2, 3))
    assert performer
    assert not performer & sblocal


def test_only_the_modules_named_are_kept():
    ours, theirs = (nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))) for _ in range(2))
    kept = ours[1][0]
    share_modules(ours, theirs, [kept])
    assert ours[0] is theirs[0]
    assert ours[1] is not theirs[1]
    assert ours[1][0] is kept
    assert ours[1][1] is theirs[1][1]


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_precisions(together, evaluation, precision, tmp_path):
    together(["performer", "full"], trainer__precision=precision)
    evaluate(evaluation("t2t_vit_t_14", "alone", model___t2tattn_cfg="full", trainer__precision=precision))
    assert read_figures(tmp_path / "together" / "1") == read_figures(tmp_path / "alone")


def test_each_attention_is_compiled_by_itself(together, monkeypatch, tmp_path):
    names, options = ["local", "sblocal"], {"eval__num_seeds": 2, "datamodule__batch_size": NUM_IMAGES}
    together(names, "eager", **options)
    calls = []
    compile_model = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: calls.append(f) or compile_model(f, **options, backend="eager")
    )
    together(names, eval__compile="true", **options)
    assert len(calls) == 2
    for number in range(2):
        ours, eager = (read_figures(tmp_path / folder / str(number)) for folder in ("together", "eager"))
        assert ours["loss"] == pytest.approx(eager["loss"], rel=1e-5)
        assert ours["top1_per_seed"] == eager["top1_per_seed"]


def test_rows_that_a_checkpoint_was_trained_with_are_those_of_the_attention_they_fit(
    together, checkpoints, shallow, tmp_path
):
    model = create_t2t_vit("t2t_vit_t_14", "sblocal", image_size=IMAGE_SIZE, num_classes=NUM_CLASSES, seed=7)
    load_checkpoint(model, checkpoints["t2t_vit_t_14"])
    torch.save({"state_dict": model.state_dict()}, tmp_path / "trained.pth")
    results, objects = together(["full", "smyrf", "sblocal"], eval__ckpt=tmp_path / "trained.pth")
    assert [result.random_features for result in results] == [None, "seeds", "checkpoint"]
    rows = objects.models["sblocal"].token_attentions[0].projection_matrix
    assert torch.equal(rows, model.token_attentions[0].projection_matrix)


# Options of the token stages


def composed(*arguments: str, names=NAMES):
    config = compose_config([f"experiment={EXPERIMENT}", "model/t2tmodel=t2t_vit_t_14", *arguments])
    config.paths.output_dir = "out"
    return attention_configs(config, names)


@pytest.mark.parametrize("name", ["full", "local", "performer", "sblocal", "sbpairedcluster"])
def test_the_configuration_is_that_of_the_group(name):
    (ours,) = composed("seed=3", names=[name])
    theirs = compose_config(
        [f"experiment={EXPERIMENT}", "model/t2tmodel=t2t_vit_t_14", "seed=3", f"model/t2tattn_cfg={name}"]
    )
    assert OmegaConf.to_container(ours.model, resolve=True) == OmegaConf.to_container(theirs.model, resolve=True)
    assert ours.paths.output_dir == "out/0"


def test_an_attention_without_its_config(monkeypatch, evaluation):
    monkeypatch.setitem(ATTENTIONS, "new", ATTENTIONS["full"])
    with pytest.raises(
        UserError, match=r"The attention 'new' has no config\. Write configs/model/t2tattn_cfg/new.yaml"
    ):
        evaluate(evaluation("t2t_vit_t_14", eval__attentions="[full,new]"))


def test_an_option_goes_to_every_attention_that_has_it():
    configs = composed("++model.t2tattn1_cfg.memory_fraction=0.0625", "++model.t2tattn2_cfg.nb_features=3")
    stages = [[config.model[f"t2tattn{stage}_cfg"] for stage in (1, 2)] for config in configs]
    # the second stage follows the first one, as in the group's files
    assert [[stage.get("memory_fraction") for stage in pair] for pair in stages] == [[None] * 2] + 3 * [[0.0625] * 2]
    assert [pair[1].get("nb_features") for pair in stages] == [None, None, 3, 3]
    assert "nb_features" not in stages[1][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"eval__attentions": "[full,sblocl]"},
            r"There is no attention 'sblocl' \(eval.attentions\). Did you mean 'sblo",
        ),
        ({"eval__attentions": "[full,null]"}, "There is no attention 'None'"),
        ({"eval__attentions": "[full,local,full]"}, "eval.attentions lists 'full' twice"),
        ({"eval__attentions": "full"}, r"eval.attentions=full is not valid. Give a list: eval.attentions=\["),
        ({"eval__attentions": "{a: 1}"}, "Give a list"),
        ({"model___t2tattn_cfg": "local"}, "chosen twice"),
        ({"model__t2tattn2_cfg": "{name: full}"}, "chosen twice"),
        (
            {"++model__t2tattn1_cfg__local_contxt": 4},
            "None of eval.attentions=full,sblocal has the option 'model.t2tattn1_cfg.local_contxt'. Did you mean 'loc",
        ),
        ({"++model__t2tattn1_cfg__local_context": -1}, "Attention sblocal: local_context=-1 is not"),
        ({"eval__redraw": "false"}, "Attention full: eval.redraw=false, but .* holds no random features"),
        ({"+trainer__limit_test_batches": 1}, "covers all images"),
    ],
)
def test_refusals(evaluation, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate(evaluation("t2t_vit_t_14", **{"eval__attentions": "[full,sblocal]", **changes}))
    assert not list(tmp_path.rglob("results.json"))


def test_a_variant_without_token_attention(evaluation):
    with pytest.raises(UserError, match="Attention full: t2t_vit_7 takes no attention"):
        evaluate(evaluation("t2t_vit_7", eval__attentions="[full,local]"))


def test_results_are_not_overwritten(together, tmp_path):
    together(["full"])
    with pytest.raises(UserError, match="together/0 holds the results of an earlier run"):
        together(["full"])


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (torch.OutOfMemoryError(), UserError, r"Attention local: The device ran out .*batch_size \(now 4\)"),
        (ZeroDivisionError("a bug"), RuntimeError, "Attention local failed, ZeroDivisionError: a bug"),
        (OSError(28, "No space left", "0/results.json"), OSError, "No space left.*0/results.json"),
    ],
)
def test_what_fails_in_one_attention_names_it(together, monkeypatch, tmp_path, error, raised, message):
    forward = T2TViT.forward

    def fail(self, images):
        if "Local" in type(self.token_attentions[0]).__name__:
            raise error
        return forward(self, images)

    monkeypatch.setattr(T2TViT, "forward", fail)
    with pytest.raises(raised, match=message):
        together(["full", "local"], model__fast="off")
    assert not list(tmp_path.rglob("results.json"))


def test_an_attention_that_gives_no_numbers_costs_no_other_its_results(together, monkeypatch, tmp_path):
    forward = T2TViT.forward

    def break_local(self, images):
        broken = "Local" in type(self.token_attentions[0]).__name__
        return forward(self, images) * (torch.nan if broken else 1)

    monkeypatch.setattr(T2TViT, "forward", break_local)
    with pytest.raises(UserError, match="Attention local: The network produced NaN"):
        together(["local", "full"], model__fast="off")
    assert [path.parent.name for path in tmp_path.rglob("results.json")] == ["1"]
    comparison = json.loads((tmp_path / "together" / "comparison.json").read_text())
    assert [row["attention"] for row in comparison["runs"]] == ["full"]
    assert comparison["failed"] == ["0"]


def test_the_progress_bar_has_count_time_and_the_range_of_accuracies(together, terminal, caplog):
    with caplog.at_level(logging.INFO):
        results, _ = together(["full", "sblocal"], callbacks="default")
    assert "with 2 attention(s), full, sblocal" in caplog.text
    lowest, highest = sorted(result.top1 for result in results)
    expected = rf"Evaluating .* 3/3 0:\d\d:\d\d • 0:00:00 \S+ images/s, top-1 {lowest:.2f} to {highest:.2f} %"
    assert re.search(expected, terminal())


def test_one_copy_of_the_weights_is_logged_as_loaded_once(together, caplog):
    with caplog.at_level(logging.INFO):
        together(["full", "local", "sblocal"], eval__num_seeds=2)
    assert caplog.text.count("Loaded t2t_vit_t_14 from") == 1
    assert caplog.messages.count("No random features in full, local: eval.num_seeds=2 is one evaluation.") == 1


def test_time_is_that_of_the_work_within(monkeypatch):
    now = iter([10.0, 12.0, 20.0, 20.5])
    monkeypatch.setattr("src.tasks.device_time.seconds_now", lambda device: next(now))
    time = DeviceTime(torch.device("cpu"))
    for _ in range(2):
        with time.measure():
            pass
    assert time.seconds() == 2.5


def test_two_processes(data, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "weights.pth", "t2t_vit_t_7")
    arguments = overrides(
        data, checkpoint, "t2t_vit_t_7", eval__attentions="[full,sblocal]", eval__num_seeds=2, datamodule__batch_size=2
    )
    one, _ = evaluate(compose_config(arguments, tmp_path / "one"))
    several, objects = evaluate(compose_config([*arguments, "trainer.devices=2"], tmp_path / "several"))
    assert not objects
    for number in range(2):
        ours, theirs = (read_figures(tmp_path / folder / str(number)) for folder in ("several", "one"))
        assert ours.pop("device").startswith("2 x cpu")
        assert theirs.pop("device").startswith("cpu")
        # sums of a batch of another size are taken in another order
        assert ours.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-5)
        assert ours == theirs
    assert [result.attention for result in several] == ["full", "sblocal"]
    np.testing.assert_allclose(several[1].top1_per_seed, one[1].top1_per_seed)
    assert (tmp_path / "several" / "comparison.json").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"trainer__precision": "bf16-true"}])
def test_steps_on_cuda_wait_for_nothing(together, monkeypatch, options):
    changes = {"datamodule__batch_size": 2, "eval__num_seeds": 2, **SYNTHETIC, **options}
    monkeypatch.setattr(trainer_module, "build_group", NoWaiting.in_place_of_callbacks)
    try:
        results, _ = together(trainer__accelerator="gpu", **changes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu, _ = together(folder="on_cpu", trainer__accelerator="cpu", **changes)
    tolerance = 1e-2 if options else 1e-4
    for ours, theirs in zip(results, on_cpu, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=tolerance)
        assert ours.images_per_second > 0
