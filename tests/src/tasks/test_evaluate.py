"""Evaluations in this process: their results against the model applied by hand, and every option."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import time

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from munch import Munch

import src.datamodules.dataset as dataset
import src.distributed.trainer as trainer_module
from scatterbrain.errors import UserError
from src.checkpoints import load_checkpoint
from src.evaluation.predictions import read_predictions
from src.evaluation.results import read_results
from src.models.t2t_vit import T2TViT, create_t2t_vit
from src.tasks.classification_evaluation import ClassificationEvaluation, SeededClassifier
from src.tasks.evaluate import evaluate
from src.utils.files import sha256_of_file
from tests.src.tasks.conftest import NUM_IMAGES
from tests.src.tasks.setup import IMAGE_SIZE, NUM_CLASSES, compose_config, overrides

CONTRACT = {
    *("model", "attention", "checkpoint", "data", "image_size", "precision", "device", "seeds", "top1", "top5", "loss"),
    *("top1_per_seed", "top1_std", "images_per_second", "peak_memory_mib", "versions", "command"),
}
# images in memory, on the command line of other images
SYNTHETIC = {
    "experiment": "synthetic-t2tvit-eval",
    "datamodule__data_dir": None,
    "datamodule__num_workers": None,
    "datamodule__num_images": 11,
    "datamodule__num_distinct": 4,
}
# what differs between two runs of the same evaluation
MEASURED = {"images_per_second", "seconds", "command"}


def read_figures(folder) -> dict:
    figures = json.loads((folder / "results.json").read_text())
    return {name: value for name, value in figures.items() if name not in MEASURED}


def apply_by_hand(objects: Munch, variant: str, checkpoint, attention=None, seed=1111) -> tuple:
    """Logits (N, classes) and targets (N,) of a loop over the images, one at a time."""
    model = create_t2t_vit(variant, attention, image_size=IMAGE_SIZE, num_classes=NUM_CLASSES, seed=seed).eval()
    load_checkpoint(model, checkpoint)
    dataset = objects.datamodule.test_dataset
    with torch.no_grad():
        logits = torch.cat([model(dataset[index][0][None]) for index in range(len(dataset))])
    return logits, torch.tensor(dataset.targets)


@pytest.mark.parametrize(
    ("variant", "attention"), [("t2t_vit_7", None), ("t2t_vit_t_14", "sblocal"), ("t2t_vit_t_14", "performer")]
)
def test_results_and_predictions_are_those_of_the_model(evaluation, checkpoints, tmp_path, variant, attention):
    changes = {} if attention is None else {"model___t2tattn_cfg": attention}
    results, objects = evaluate(evaluation(variant, datamodule__batch_size=1, **changes))
    logits, targets = apply_by_hand(objects, variant, checkpoints[variant], attention)

    probabilities, classes = logits.softmax(-1).sort(-1, descending=True)
    hits = classes[:, 0] == targets
    assert 0 < hits.sum() < NUM_IMAGES  # or the figures could be right by chance
    assert results.top1 == pytest.approx(100 * hits.double().mean().item(), abs=1e-12)
    assert results.top5 == 100.0
    assert results.loss == pytest.approx(F.cross_entropy(logits.double(), targets).item(), rel=1e-6)

    stored = read_predictions(tmp_path / "run")
    paths = [f"c{index % NUM_CLASSES}/{index:03}.png" for index in range(NUM_IMAGES)]
    assert stored.images == sorted(paths)
    assert stored.targets.tolist() == targets.tolist()
    assert stored.classes.tolist() == classes.tolist()
    # normalised in another order of operations; what is written has eight digits
    recorded = objects.task.records[0].top5_probabilities[0]
    np.testing.assert_allclose(recorded, probabilities.numpy(), rtol=1e-5)
    np.testing.assert_allclose(stored.probabilities, recorded, rtol=1e-7)


def test_the_results_file(evaluation, checkpoints, data, tmp_path):
    results, _ = evaluate(evaluation())
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    assert content.keys() >= CONTRACT
    assert content["model"] == "t2t_vit_7"
    assert content["attention"] is None
    checkpoint = checkpoints["t2t_vit_7"]
    assert content["checkpoint"] == {"path": str(checkpoint), "sha256": sha256_of_file(checkpoint)}
    expected = {"dir": str(data), "split": "val", "num_images": NUM_IMAGES, "num_classes": NUM_CLASSES}
    assert content["data"] == expected
    assert (content["image_size"], content["precision"], content["seeds"]) == (IMAGE_SIZE, "32-true", [1111])
    assert content["device"].startswith("cpu")
    assert content["peak_memory_mib"] is None
    assert content["top1_std"] is None
    assert content["top1_per_seed"] == [content["top1"]] == [results.top1]
    assert content["images_per_second"] > 0
    assert content["versions"]["torch"] == torch.__version__
    assert "attention_options" in content


def test_the_same_seed_gives_the_same_files(evaluation, tmp_path):
    options = {"model___t2tattn_cfg": "performer"}
    for folder in ("first", "second"):
        evaluate(evaluation("t2t_vit_t_14", folder, **options))
    assert read_figures(tmp_path / "first") == read_figures(tmp_path / "second")
    first, second = ((tmp_path / folder / "predictions.csv").read_bytes() for folder in ("first", "second"))
    assert first == second


def test_seeds_are_those_of_single_runs_and_images_are_decoded_once(evaluation, monkeypatch, tmp_path):
    decoded = []
    decode = dataset.load_rgb
    monkeypatch.setattr(dataset, "load_rgb", lambda path, *limits: decoded.append(path.name) or decode(path, *limits))
    options = {"model___t2tattn_cfg": "performer"}
    several, objects = evaluate(evaluation("t2t_vit_t_14", "several", eval__num_seeds=3, **options))
    assert sorted(decoded) == [f"{index:03}.png" for index in range(NUM_IMAGES)]
    assert several.seeds == [1111, 1112, 1113]

    records = objects.task.records[0]
    assert not np.array_equal(records.losses[0], records.losses[1])
    for draw in (1, 2):
        single, alone = evaluate(evaluation("t2t_vit_t_14", f"single{draw}", seed=1111 + draw, **options))
        np.testing.assert_array_equal(alone.task.records[0].losses[0], records.losses[draw])
        assert several.top1_per_seed[draw] == single.top1
    assert several.top1 == pytest.approx(np.mean(several.top1_per_seed))
    assert several.top1_std == pytest.approx(np.std(several.top1_per_seed, ddof=1))
    first = read_predictions(tmp_path / "several").probabilities
    np.testing.assert_allclose(first, records.top5_probabilities[0], rtol=1e-7)


def test_without_random_features_several_seeds_are_one(evaluation):
    results, _ = evaluate(evaluation(eval__num_seeds=4))
    assert results.seeds == [1111]


@pytest.fixture
def trained_with_rows(checkpoints, shallow, tmp_path):
    """A checkpoint that holds the rows of its Scatterbrain attention, those of seed 7."""
    model = create_t2t_vit("t2t_vit_t_14", "sblocal", image_size=IMAGE_SIZE, num_classes=NUM_CLASSES, seed=7)
    load_checkpoint(model, checkpoints["t2t_vit_t_14"])
    path = tmp_path / "trained.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "seed_of_rows", "origin"),
    [
        ({}, 7, "checkpoint"),
        ({"eval__redraw": "false"}, 7, "checkpoint"),
        ({"eval__redraw": "true"}, 1111, "seeds"),
        ({"eval__num_seeds": 2}, 1111, "seeds"),
    ],
)
def test_rows_that_a_checkpoint_was_trained_with(evaluation, trained_with_rows, changes, seed_of_rows, origin):
    options = {"model___t2tattn_cfg": "sblocal", "datamodule__batch_size": 1, "eval__ckpt": trained_with_rows}
    results, objects = evaluate(evaluation("t2t_vit_t_14", **options, **changes))
    by_hand = create_t2t_vit("t2t_vit_t_14", "sblocal", image_size=IMAGE_SIZE, num_classes=NUM_CLASSES).eval()
    load_checkpoint(by_hand, trained_with_rows)
    by_hand.redraw_projections(seed_of_rows)
    dataset = objects.datamodule.test_dataset
    with torch.no_grad():
        logits = torch.cat([by_hand(dataset[index][0][None]) for index in range(len(dataset))])
    expected = F.cross_entropy(logits, torch.tensor(dataset.targets), reduction="none")
    np.testing.assert_allclose(objects.task.records[0].losses[0], expected, rtol=1e-5)
    assert results.random_features == origin


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval__num_seeds": 2}, "Leave out eval.num_seeds"),
        ({"model__t2tattn1_cfg__nb_features": 6}, "holds no random features for this attention"),
        ({"eval__redraw": 3}, "eval.redraw=3 is not valid"),
    ],
)
def test_rows_that_cannot_be_kept(evaluation, trained_with_rows, changes, message):
    options = {"model___t2tattn_cfg": "sblocal", "eval__ckpt": trained_with_rows, "eval__redraw": "false", **changes}
    with pytest.raises(UserError, match=message):
        evaluate(evaluation("t2t_vit_t_14", **options))


@pytest.mark.parametrize(
    ("precision", "reported", "tolerance"),
    [("bf16-mixed", "bf16-mixed", 3e-2), ("bf16-true", "bf16-true", 3e-2), ("64-true", "64-true", 1e-5)],
)
def test_precision(evaluation, precision, reported, tolerance):
    exact, reference = evaluate(evaluation(folder="exact"))
    results, objects = evaluate(evaluation(trainer__precision=precision))
    assert results.precision == reported
    losses, expected = objects.task.records[0].losses, reference.task.records[0].losses
    np.testing.assert_allclose(losses, expected, rtol=tolerance, atol=tolerance)
    assert not np.array_equal(losses, expected)
    kept = objects.task.classifiers[0].image_records.losses.dtype
    assert kept == (torch.float64 if precision == "64-true" else torch.float32)
    assert exact.precision == "32-true"


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("16-true", torch.float16),
        ("64-true", torch.float64),
        ("bf16-mixed", torch.float32),
    ],
)
@pytest.mark.parametrize("datamodule", ["imagenet", "synthetic"])
def test_images_reach_the_model_in_the_dtype_of_its_weights(evaluation, monkeypatch, datamodule, precision, dtype):
    seen = []
    forward = T2TViT.forward
    monkeypatch.setattr(T2TViT, "forward", lambda self, images: seen.append(images) or forward(self, images))
    changes = SYNTHETIC if datamodule == "synthetic" else {}
    _, objects = evaluate(evaluation(trainer__precision=precision, model__fast="off", **changes))
    assert {images.dtype for images in seen} == {dtype}
    assert {weight.dtype for weight in objects.model.parameters()} == {dtype}
    # as precise as the dtype is: half a unit of the last place of numbers below 4
    batch = next(iter(objects.datamodule.test_dataloader()))[0]
    expected = objects.datamodule.normalise(batch)
    assert (seen[0].float() - expected).abs().max() <= 4 * torch.finfo(dtype).eps


def test_synthetic_images(evaluation, tmp_path):
    results, objects = evaluate(evaluation(**SYNTHETIC))
    images = objects.datamodule.normalise(objects.datamodule.test_dataset.pixels)
    with torch.no_grad():
        logits = objects.model.eval()(images)[torch.arange(11) % 4]
    targets = objects.datamodule.test_dataset.targets
    assert results.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    expected = {"dir": "synthetic", "split": "test", "num_images": 11, "num_classes": NUM_CLASSES}
    assert json.loads((tmp_path / "run" / "results.json").read_text())["data"] == expected
    stored = read_predictions(tmp_path / "run")
    assert stored.images == [f"synthetic/{index:08}" for index in range(11)]
    assert stored.targets.tolist() == targets.tolist()


def test_half_precision_is_replaced_where_the_cpu_has_none(evaluation):
    config = evaluation(trainer__precision="16-mixed")
    with pytest.warns(UserWarning, match="fp16 is not supported on CPU"):
        results, _ = evaluate(config)
    assert results.precision == "bf16-mixed"


def test_compiled_equals_eager(evaluation):
    options = {"model___t2tattn_cfg": "sblocal", "eval__num_seeds": 2, "datamodule__batch_size": NUM_IMAGES}
    _, eager = evaluate(evaluation("t2t_vit_t_14", "eager", **options))
    calls = []
    # "eager" traces and guards as any backend does, which is where draws could go stale, but needs no compiler
    compile_model = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch, "compile", lambda f, **options: calls.append(f) or compile_model(f, **options, backend="eager")
        )
        _, compiled = evaluate(evaluation("t2t_vit_t_14", "compiled", eval__compile="true", **options))
    assert len(calls) == 1
    np.testing.assert_allclose(compiled.task.records[0].losses, eager.task.records[0].losses, rtol=1e-5)


def test_a_compiled_model_sees_one_batch_size(evaluation, monkeypatch):
    assert NUM_IMAGES % 4
    sizes = []

    def compile_model(model, **options):
        def forward(images):
            sizes.append(len(images))
            return model(images)

        return forward

    _, eager = evaluate(evaluation(datamodule__batch_size=4))
    monkeypatch.setattr(torch, "compile", compile_model)
    _, compiled = evaluate(evaluation(folder="compiled", datamodule__batch_size=4, eval__compile="true"))
    assert set(sizes) == {4}
    np.testing.assert_array_equal(compiled.task.records[0].top5_classes, eager.task.records[0].top5_classes)
    np.testing.assert_allclose(compiled.task.records[0].losses, eager.task.records[0].losses, rtol=1e-5)


def test_a_compiler_that_fails_is_one_error(evaluation, monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    def compile_model(model, **options):
        def forward(images):
            raise InvalidCxxCompiler

        return forward

    monkeypatch.setattr(torch, "compile", compile_model)
    with pytest.raises(UserError, match=r"torch.compile failed: .*Leave out eval.compile=true"):
        evaluate(evaluation(eval__compile="true"))


def test_lack_of_memory_names_the_batch_size(evaluation, monkeypatch):
    def forward(self, images):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(T2TViT, "forward", forward)
    with pytest.raises(UserError, match=r"Lower datamodule.batch_size \(now 4\)"):
        evaluate(evaluation(model__fast="off"))


def test_the_csv_logger_has_the_metrics(evaluation, tmp_path):
    results, _ = evaluate(evaluation())
    header, row = (tmp_path / "run" / "csv" / "metrics.csv").read_text().splitlines()
    figures = dict(zip(header.split(","), row.split(","), strict=True))
    assert float(figures["test/top1"]) == pytest.approx(results.top1, rel=1e-6)
    assert float(figures["test/loss"]) == pytest.approx(results.loss, rel=1e-6)


def test_the_tensorboard_logger_has_the_metrics(evaluation, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    results, _ = evaluate(evaluation(logger="tensorboard"))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert events.Scalars("test/top1")[-1].value == pytest.approx(results.top1, rel=1e-6)


def test_the_progress_bar_shows_rate_and_accuracy(evaluation, terminal):
    results, _ = evaluate(evaluation(callbacks="default"))
    shown = terminal()
    assert "Evaluating" in shown
    assert "images/s, top-1" in shown
    assert f"top-1 {results.top1:.2f} %" in shown
    assert re.search(r"Evaluating .* 3/3 0:\d\d:\d\d • 0:00:00 \S+ images/s, top-1 \S+ %", shown)


def test_what_is_no_terminal_gets_lines_of_the_log(evaluation, capsys, caplog):
    config = evaluation(callbacks="default")
    config.callbacks.progress_bar.log_seconds = 0
    with caplog.at_level(logging.INFO):
        results, _ = evaluate(config)
    lines = [line for line in caplog.messages if line.startswith("Evaluating: ")]
    assert len(lines) == 3
    assert re.fullmatch(r"Evaluating: batch 1 of 3, \S+ images/s, top-1 \S+ %", lines[0])
    assert re.fullmatch(r"Evaluating: batch 2 of 3, \S+ images/s, top-1 \S+ %, 0:\d\d:\d\d left", lines[1])
    assert re.fullmatch(rf"Evaluating: batch 3 of 3, \S+ images/s, top-1 {results.top1:.2f} %", lines[2])
    assert "━" not in capsys.readouterr().out.split("image")[0]


def test_compilation_is_logged_and_is_in_no_rate(evaluation, monkeypatch, caplog):
    seconds = 2.0

    def compile_model(model, **options):
        calls = []

        def forward(images):
            if not calls:
                time.sleep(seconds)
            calls.append(len(images))
            return model(images)

        return forward

    monkeypatch.setattr(torch, "compile", compile_model)
    rates = []
    progress = ClassificationEvaluation.progress_so_far
    monkeypatch.setattr(
        ClassificationEvaluation, "progress_so_far", lambda self: rates.append(progress(self)) or rates[-1]
    )
    config = evaluation(datamodule__batch_size=NUM_IMAGES, eval__compile="true", callbacks="default")
    with caplog.at_level(logging.INFO):
        results, _ = evaluate(config)
    assert "Compiling (eval.compile=true)" in caplog.text
    assert "Compiled in 2 s" in caplog.text
    assert results.seconds < seconds / 2
    assert results.images_per_second > 2 * NUM_IMAGES / seconds
    assert [float(rate.split()[0].replace(",", "")) > 2 * NUM_IMAGES / seconds for rate in rates] == [True]


def test_no_callbacks_is_no_progress_bar(evaluation, capsys):
    evaluate(evaluation())
    assert "3/3" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value"), [("+trainer__limit_test_batches", 1), ("+trainer__limit_test_batches", 0.5)]
)
def test_a_part_of_the_images_is_refused(evaluation, option, value):
    with pytest.raises(UserError, match="covers all images"):
        evaluate(evaluation(**{option: value}))


def test_results_are_not_overwritten(evaluation, tmp_path):
    evaluate(evaluation())
    before = (tmp_path / "run" / "results.json").read_bytes()
    with pytest.raises(UserError, match="holds the results of an earlier run"):
        evaluate(evaluation())
    assert (tmp_path / "run" / "results.json").read_bytes() == before


def test_weights_that_give_nan_leave_no_results(evaluation, checkpoints, tmp_path):
    weights = torch.load(checkpoints["t2t_vit_7"])["state_dict_ema"]
    weights["head.weight"] = torch.full_like(weights["head.weight"], 3e38)
    torch.save(weights, tmp_path / "nan.pth")
    with pytest.raises(UserError, match="NaN"):
        evaluate(evaluation(eval__ckpt=tmp_path / "nan.pth"))
    assert not (tmp_path / "run" / "results.json").exists()
    assert not (tmp_path / "run" / "predictions.csv").exists()


class NoWaiting(pl.Callback):
    """Lets whatever makes the host wait for the device fail, from the second step on: the first one warms up."""

    @classmethod
    def in_place_of_callbacks(cls, config, group):
        return [cls()] if group == "callbacks" else []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error")

    def on_test_epoch_end(self, trainer, pl_module):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"eval__num_seeds": 2}, {"trainer__precision": "bf16-true"}])
@pytest.mark.parametrize("datamodule", ["imagenet", "synthetic"])
def test_steps_on_cuda_wait_for_nothing(evaluation, monkeypatch, datamodule, options):
    changes = {"trainer__accelerator": "gpu", "model___t2tattn_cfg": "sblocal", "datamodule__batch_size": 2, **options}
    changes |= SYNTHETIC if datamodule == "synthetic" else {}
    monkeypatch.setattr(trainer_module, "build_group", NoWaiting.in_place_of_callbacks)
    try:
        results, _ = evaluate(evaluation("t2t_vit_t_14", **changes))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu, _ = evaluate(evaluation("t2t_vit_t_14", "on_cpu", **changes | {"trainer__accelerator": "cpu"}))
    assert results.loss == pytest.approx(on_cpu.loss, rel=1e-2 if "trainer__precision" in options else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_a_compiled_model_on_cuda_sees_every_draw(evaluation, precision):
    options = {
        **{"trainer__accelerator": "gpu", "trainer__precision": precision, "datamodule__batch_size": 4},
        **{"model___t2tattn_cfg": "sblocal", "eval__num_seeds": 2},
    }
    _, eager = evaluate(evaluation("t2t_vit_t_14", "eager", **options))
    _, compiled = evaluate(evaluation("t2t_vit_t_14", "compiled", eval__compile="true", **options))
    tolerance = 1e-4 if precision == "32-true" else 3e-2
    np.testing.assert_allclose(
        compiled.task.records[0].losses, eager.task.records[0].losses, rtol=tolerance, atol=tolerance
    )
    assert not np.array_equal(compiled.task.records[0].losses[0], compiled.task.records[0].losses[1])


def test_a_process_that_decodes_and_is_killed(evaluation, monkeypatch, tmp_path):
    decode = dataset.ImageDataset.decode
    parent = os.getpid()

    def die(self, index):
        if index == 3 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(self, index)

    monkeypatch.setattr(dataset.ImageDataset, "decode", die)
    with pytest.raises(UserError) as caught:
        evaluate(evaluation("t2t_vit_7", datamodule__num_workers=1, datamodule__batch_size=2))
    message = str(caught.value)
    assert message.startswith("A process that loads images ended before its work was done (DataLoader worker (pid")
    assert message.endswith("often for lack of memory. Lower datamodule.num_workers or datamodule.batch_size (now 2).")
    assert not (tmp_path / "run" / "results.json").exists()


def test_too_little_shared_memory(evaluation, monkeypatch):
    def fail(self, *batch):
        raise RuntimeError(
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are "
            "out of shared memory. Please try to raise your shared memory limit."
        )

    monkeypatch.setattr(SeededClassifier, "step", fail)
    with pytest.raises(UserError, match="or give a container more shared memory: docker run --shm-size=8g"):
        evaluate(evaluation("t2t_vit_7"))


def test_other_errors_stay_as_they_are(evaluation, monkeypatch):
    def fail(self, *batch):
        raise RuntimeError("a bug")

    monkeypatch.setattr(SeededClassifier, "step", fail)
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        evaluate(evaluation("t2t_vit_7"))


def test_a_notebook(data, checkpoints, shallow, tmp_path):
    """Without Hydra's command line: the folder is an option, checked before the work and created."""
    arguments = overrides(data, checkpoints["t2t_vit_7"], "t2t_vit_7")
    with pytest.raises(UserError, match=r"Outside of run.py .* overrides=\['paths.output_dir=FOLDER'"):
        evaluate(compose_config(arguments))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run cannot be written to \(Not a directory\)"):
        evaluate(compose_config([*arguments, f"paths.output_dir={tmp_path}/file/run"]))
    results, objects = evaluate(compose_config([*arguments, f"paths.output_dir={tmp_path}/new/run"]))
    assert results == read_results(tmp_path / "new" / "run")
    assert set(objects) == {"model", "datamodule", "task", "trainer"}
