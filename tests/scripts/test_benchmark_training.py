"""The benchmark of training steps: what a step is, what is reported of it, and how it fails."""

import dataclasses
import json
import statistics

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from scatterbrain.attention import COMPARED
from scripts import benchmark_training as benchmark
from src.analysis.benchmark import training
from src.analysis.benchmark.timing import in_turn
from src.analysis.benchmark.training import TrainingBench
from src.models.t2t_vit import T2T_VIT_VARIANTS

BATCH = 2
SMALL = ["--device", "cpu", "--image-size", "32", "--num-classes", "5", "--batch-size", str(BATCH)]
QUICK = ["--rounds", "3", "--steps-per-round", "2"]


@pytest.fixture(autouse=True, scope="module")
def shallow():
    """One backbone block in place of 7."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(T2T_VIT_VARIANTS, "t2t_vit_t_7", dataclasses.replace(T2T_VIT_VARIANTS["t2t_vit_t_7"], depth=1))
        yield


def run(folder, *options):
    """The JSON file of a run."""
    output = folder / "steps.json"
    assert benchmark.main([*SMALL, *QUICK, *options, "--output", str(output)]) == 0
    return json.loads(output.read_text(encoding="utf-8"))


def by_name(content):
    return {row["attention"]: row for row in content["results"]}


def make_bench(*options):
    return TrainingBench(benchmark.build_parser().parse_args([*SMALL, *QUICK, *options]))


def make_candidate(name, *options):
    """A candidate and its batch."""
    bench = make_bench("--attentions", name, *options)
    return bench.candidates[-1], bench.batch


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return run(tmp_path_factory.mktemp("steps"), "--memory-fraction", "1/4", "--threads", "1")


def test_every_attention_is_reported(content):
    assert [row["attention"] for row in content["results"]] == list(COMPARED)
    full = by_name(content)["full"]
    assert full["time_ratio_to_full"] == 1
    for row in content["results"]:
        assert len(row["milliseconds_per_round"]) == 3
        assert min(row["milliseconds_per_round"]) > 0
        assert row["milliseconds"] == statistics.median(row["milliseconds_per_round"])
        assert row["time_ratio_to_full"] == pytest.approx(row["milliseconds"] / full["milliseconds"])
        assert row["images_per_second"] == pytest.approx(BATCH / (row["milliseconds"] / 1e3))
        assert row["out_of_memory"] is False
        assert row["peak_memory_mib"] is row["memory_ratio_to_full"] is None
    # 64 and 16 tokens; half of the budget each for window and features
    assert [stage["local_context"] for stage in by_name(content)["sblocal"]["options"]] == [8, 2]


def test_settings_and_machine(content):
    assert content["machine"]["threads"] == 1
    assert content["machine"]["torch"] == torch.__version__
    wanted = {"variant": "t2t_vit_t_7", "batch_size": BATCH, "precision": "32", "memory_fraction": 1 / 4}
    assert {name: content["settings"][name] for name in wanted} == wanted


def test_full_is_measured_unasked(tmp_path, capsys):
    content = run(tmp_path, "--attentions", "performer", "--precision", "bf16-mixed")
    assert list(by_name(content)) == ["full", "performer"]
    assert content["settings"]["precision"] == "bf16-mixed"
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("full", "performer", "bf16-mixed", "3 rounds of 2 steps"))


def test_all_attentions_start_from_the_same_weights():
    first, *others = make_bench().candidates
    weights = dict(first.task.model.named_parameters())
    assert len(others) == len(COMPARED) - 1
    for other in others:
        found = dict(other.task.model.named_parameters())
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights), other.name


@pytest.mark.parametrize("precision", training.PRECISIONS)
@pytest.mark.parametrize("name", ["full", "sblocal"])
def test_steps_are_those_of_a_plain_training(name, precision):
    candidate, (images, targets) = make_candidate(name, "--precision", precision)
    reference, _ = make_candidate(name)
    model = reference.task.model
    before = {key: weight.clone() for key, weight in model.named_parameters() if weight.requires_grad}
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-4, weight_decay=0.05)
    for _ in range(3):
        with candidate.on_device():
            candidate.step([images, targets])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            logits = model(images)
        loss = -(targets * F.log_softmax(logits.float(), dim=-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = dict(candidate.task.model.named_parameters())
    for key, weight in model.named_parameters():
        torch.testing.assert_close(after[key], weight, rtol=1e-4, atol=1e-5)
    assert all(not torch.equal(after[key], weight) for key, weight in before.items())


@pytest.mark.parametrize(("precision", "dtype"), [("32", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_precision_is_that_of_the_forward_pass(precision, dtype):
    candidate, batch = make_candidate("local", "--precision", precision)
    logits = []
    candidate.task.model.head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    candidate.step(batch)
    assert [x.dtype for x in logits] == [dtype]
    assert {weight.dtype for weight in candidate.task.model.parameters()} == {torch.float32}


def test_number_of_steps(monkeypatch):
    genuine, steps = training.Candidate.step, []
    monkeypatch.setattr(training.Candidate, "step", lambda self, batch: (steps.append(self.name), genuine(self, batch)))
    bench = make_bench("--attentions", "local")
    bench.run()
    in_all = training.WARM_UP_STEPS + 3 * (1 + 2)
    assert {name: steps.count(name) for name in steps} == {"full": in_all, "local": in_all}
    for candidate in bench.candidates:
        counts = {int(state["step"]) for state in candidate.optimizer.state.values()}
        assert counts == {in_all}, "the optimizer resumes where it was"


def test_each_round_takes_every_candidate_once():
    rounds = list(in_turn("abcd", 4))
    assert rounds == list("abcd" + "bcda" + "cdab" + "dabc")


def fail(monkeypatch, name, error, from_step=1):
    """Let the steps of one attention fail from the given one on."""
    genuine, steps = training.Candidate.step, []

    def step(self, batch):
        steps.append(self.name)
        if self.name == name and steps.count(name) >= from_step:
            raise error
        genuine(self, batch)

    monkeypatch.setattr(training.Candidate, "step", step)


@pytest.mark.parametrize("from_step", [1, training.WARM_UP_STEPS + 3 + 2], ids=["at once", "second round"])
@pytest.mark.parametrize("name", ["full", "local"])
def test_out_of_memory(name, from_step, tmp_path, capsys, monkeypatch):
    fail(monkeypatch, name, torch.OutOfMemoryError("CUDA out of memory."), from_step)
    found = by_name(run(tmp_path, "--attentions", "local,sblocal"))
    failed = found.pop(name)
    assert failed["out_of_memory"] is True
    assert failed["milliseconds_per_round"] == []
    for key in ("milliseconds", "images_per_second", "time_ratio_to_full", "peak_memory_mib", "memory_ratio_to_full"):
        assert failed[key] is None
    for row in found.values():
        assert row["out_of_memory"] is False
        assert row["milliseconds"] > 0
        assert (row["time_ratio_to_full"] is None) == (name == "full")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "out of memory" in line)
    assert name in line


def test_memory_is_compared_with_that_of_full():
    bench = make_bench("--attentions", "performer,local")
    for candidate, peak in zip(bench.candidates, (4 << 20, 1 << 20, 6 << 20), strict=True):
        candidate.milliseconds, candidate.peak_bytes = [1.0, 2.0, 3.0], peak
    found = [(row["peak_memory_mib"], row["memory_ratio_to_full"]) for row in bench.results()]
    assert found == [(4, 1), (1, 0.25), (6, 1.5)]


@pytest.mark.gpu
def test_memory_of_cuda_is_that_of_one_network_alone(tmp_path):
    options = ["--device", "cuda", "--image-size", "224", "--batch-size", "8"]
    alone = by_name(run(tmp_path, *options, "--attentions", "sblocal"))
    among_others = by_name(run(tmp_path, *options))
    for name in ("full", "sblocal"):
        assert among_others[name]["peak_memory_mib"] == pytest.approx(alone[name]["peak_memory_mib"], rel=0.01)
    assert among_others["performer"]["memory_ratio_to_full"] < 1


def test_other_faults_are_reported_in_one_line(capsys, monkeypatch):
    fail(monkeypatch, "local", RuntimeError("no kernel for this.\nC++ stack"))
    assert benchmark.main([*SMALL, *QUICK, "--attentions", "local"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "Error: local fails (no kernel for this)."


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--variant", "t2t_vit_t_77"], ["t2t_vit_t_77", "t2t_vit_t_7"]),
        (["--variant", "t2t_vit_7"], ["t2t_vit_7", "cannot be swapped", "t2t_vit_t_14"]),
        (["--attentions", "full,sblocl"], ["sblocl", "sblocal"]),
        (["--batch-size", "0"], ["--batch-size", "'0'"]),
        (["--batch-size", "1" + 12 * "0"], ["--batch-size", "Lower it"]),
        (["--image-size", "33"], ["image_size=33", "16"]),
        (["--num-classes", "-1"], ["--num-classes", "'-1'"]),
        (["--rounds", "x"], ["--rounds", "'x'"]),
        (["--steps-per-round", "0"], ["--steps-per-round", "'0'"]),
        (["--memory-fraction", "1/0"], ["--memory-fraction", "1/0"]),
        (["--memory-fraction", "2"], ["memory_fraction=2.0"]),
        (["--precision", "8"], ["--precision", "'8'", "bf16-mixed"]),
        (["--threads", "none"], ["--threads", "'none'"]),
        (["--device", "gpu"], ["--device", "'gpu'", "cuda"]),
        (["--output", "no/such/folder/steps.json"], ["no/such/folder/steps.json"]),
    ],
)
def test_wrong_options(options, words, capsys):
    assert benchmark.main([*SMALL, *options]) == 1
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("Error: ")
    assert captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_absent_cuda_is_named(capsys):
    assert benchmark.main(["--device", "cuda"]) == 1
    assert "--device cpu" in capsys.readouterr().err
