"""Trainings on sequences: the documented commands on tiny data, time limits, resuming, and comparisons."""

from __future__ import annotations

import json
import math
import signal
import sys

import pytest
import torch
import torch.nn.functional as F

import run
from scatterbrain.errors import UserError
from scripts import compare_trainings
from src.datamodules.sequences.base import IGNORED
from src.evaluation.sequence_comparison import comparison_markdown, read_results
from src.evaluation.sequence_summary import read_summary
from src.tasks import train_sequence as module
from src.tasks.optimization import warmup_and_decay
from src.tasks.sequence_training import SequenceTraining, sample_scores, summarise
from src.tasks.train_sequence import train_sequence
from src.tasks.training_checkpoints import read_training_checkpoint
from tests.hydra_helpers import hydra_restored
from tests.src.tasks.setup import compose_config

SMALL = ["model.dim=16", "model.depth=2", "model.heads=2", "model.mlp_dim=16", "model.memory_fraction=0.25"]
SMALL += ["trainer.accelerator=cpu", "callbacks.progress_bar=null", "logger=none", "datamodule.length=32"]
SMALL += ["train.steps=5", "train.eval_steps=2", "datamodule.batch_size=8"]
SIZES = ["datamodule.read.num_train=60", "datamodule.read.num_validation=20", "datamodule.read.num_test=10"]
LISTOPS = [*SIZES, "datamodule.read.shortest=8", "datamodule.read.cache=null"]
OPTIONS = {
    "lra-listops": LISTOPS,
    "copy": SIZES,
    "language": ["datamodule.read.limit=300000", "datamodule.eval_windows=4"],
}
METRICS = {"lra-listops": "accuracy", "copy": "perplexity", "language": "bits_per_byte"}


def small(experiment, *options):
    """Command line of a small training."""
    return [f"experiment={experiment}", *SMALL, *OPTIONS[experiment], *options]


@pytest.fixture
def training(tmp_path):
    """Function from a folder's name and options to the summary and the objects of a training there."""

    def train(name, *options, experiment="lra-listops"):
        return train_sequence(compose_config(small(experiment, *options), tmp_path / name))

    return train


def weights(path):
    return read_training_checkpoint(path / "checkpoints" / "last.ckpt")


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", OPTIONS)
def test_the_documented_command(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", *small(experiment, "model/attention=sblocal", "hydra.run.dir=here")])
    with hydra_restored():
        assert run.run(sys.argv) == 0
    metric = METRICS[experiment]
    assert f"test {metric.replace('_', ' ')}" in capsys.readouterr().out
    summary = read_summary(tmp_path / "here" / "sequence_training.json")
    assert (summary.task, summary.attention, summary.metric) == (experiment, "sblocal", metric)
    assert summary.complete
    assert summary.steps_done == 5
    assert [entry["step"] for entry in summary.history] == [2, 4, 5]
    assert summary.validation == summary.history[-1]
    assert summary.best in summary.history
    assert summary.test[metric] > 0 or metric == "accuracy"
    assert summary.precision == "32-true"
    assert 0 < summary.seconds <= summary.total_seconds
    assert summary.tokens_per_second > 0
    assert summary.sizes["local_context"] == 4
    assert set(summary.checkpoints) == {"best", "last"}
    assert summary.data["baselines"]


def test_a_multirun_ends_with_a_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = small("copy", "model/attention=full,smyrf,sblocal", "seed=1,2", "hydra.sweep.dir=sweep")
    monkeypatch.setattr(sys, "argv", ["run.py", "-m", *arguments])
    with hydra_restored():
        assert run.run(sys.argv) == 1
    captured = capsys.readouterr()
    # it is said, and the others are trained
    assert captured.err.count("cannot be causal") == 2
    assert "(chance)" in captured.out
    for name in ("comparison.json", "comparison.md", "comparison.png"):
        assert (tmp_path / "sweep" / name).stat().st_size > 0
    comparison = read_results(tmp_path / "sweep" / "comparison.json")
    assert [(each.attention, each.seed) for each in comparison.summaries] == [
        *[("full", 1), ("full", 2), ("sblocal", 1), ("sblocal", 2)]
    ]
    assert len(comparison.failed) == 2
    (groups,) = comparison.tasks().values()
    assert {label: len(group) for label, group in groups.items()} == {"full": 2, "sblocal": 2}
    table = (tmp_path / "sweep" / "comparison.md").read_text()
    assert "| sblocal | 2 | 24.2 % |" in table or "| sblocal | 2 | 25.0 % |" in table

    # the same by the script, of the folders
    output, figure = tmp_path / "results.json", tmp_path / "curves.png"
    assert compare_trainings.main([str(tmp_path / "sweep"), f"--output={output}", f"--figure={figure}"]) == 0
    assert f"Runs without results: {', '.join(comparison.failed)}" in capsys.readouterr().out
    assert figure.stat().st_size > 0
    assert json.loads(output.read_text())["results"] == json.loads(
        (tmp_path / "sweep" / "comparison.json").read_text()
    ).pop("results")
    assert str(tmp_path) not in json.dumps(json.loads(output.read_text())["results"])


# Steps and time -------------------------------------------------------------------------------------------------------


def test_a_time_limit_ends_in_a_test_of_what_was_reached(training, tmp_path, monkeypatch):
    whole, _ = training("whole")
    clock = iter(range(0, 1000, 30))
    monkeypatch.setattr("src.tasks.training_checkpoints.time.monotonic", lambda: next(clock))
    summary, _ = training("part", "train.max_time=00:01:15")
    monkeypatch.undo()
    assert not summary.complete
    assert summary.steps == 5
    assert 0 < summary.steps_done < 5
    assert summary.test is not None
    assert summary.seconds > 0
    assert summary.tokens_per_second > 0
    resumed, _ = training("part", "train.resume=true")
    assert resumed.complete
    assert resumed.total_seconds > summary.total_seconds
    assert_same(resumed, whole, tmp_path / "part", tmp_path / "whole")


def test_a_training_that_is_killed_leaves_what_it_reached(training, tmp_path, monkeypatch):
    step = SequenceTraining.training_step

    def killed(task, batch, index):
        if task.global_step == 3:
            raise OSError("killed")
        return step(task, batch, index)

    monkeypatch.setattr(SequenceTraining, "training_step", killed)
    with pytest.raises(OSError, match="killed"):
        training("killed", "callbacks.last.minutes_between=0.0000001")  # a save before each evaluation
    summary = read_summary(tmp_path / "killed" / "sequence_training.json")
    assert (summary.steps_done, summary.steps, summary.complete, summary.error) == (2, 5, False, None)
    assert summary.test is None
    assert [entry["step"] for entry in summary.history] == [2]
    assert summary.validation == summary.best == summary.history[0]
    # the checkpoint before the evaluation has counted the same steps
    assert 0 < summary.seconds == summary.history[0]["seconds"] < summary.total_seconds


def assert_same(ours, theirs, our_folder, their_folder):
    """Fail unless two trainings are the same, bit for bit, but for times."""
    for mine, other in zip(ours.history, theirs.history, strict=True):
        for name in mine.keys() - {"seconds", "evaluation_seconds", "tokens_per_second"}:
            assert mine[name] == other[name], name
    assert ours.test == theirs.test
    mine, other = weights(our_folder)["state_dict"], weights(their_folder)["state_dict"]
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_training_goes_on_exactly_after_sigterm(training, tmp_path, monkeypatch, step):
    options = ("model/attention=sblocal", "train.redraw_steps=3", "model.dropout=0.3")
    whole, _ = training("whole", *options)
    take = SequenceTraining.training_step

    def stop(self, batch, batch_idx):
        if self.global_step == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return take(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SequenceTraining, "training_step", stop)
        with pytest.raises(SystemExit):
            training("part", *options)
    part = read_summary(tmp_path / "part" / "sequence_training.json")
    assert (part.steps_done, part.complete, part.test) == (step, False, None)
    if step == 4:  # and a part that is complete
        assert len(part.history) == 2
    resumed, _ = training("part", *options, "train.resume=true")
    assert_same(resumed, whole, tmp_path / "part", tmp_path / "whole")
    # of a finished training, the results are written again
    again, _ = training("part", *options, "train.resume=true")
    assert_same(again, whole, tmp_path / "part", tmp_path / "whole")
    assert again.complete


@pytest.mark.parametrize("stage", ["training", "test"])
def test_the_exit_status_after_sigterm(stage, tmp_path, monkeypatch):
    name = f"{stage}_step"
    take = getattr(SequenceTraining, name)

    def stop(self, batch, batch_idx):
        signal.raise_signal(signal.SIGTERM)
        return take(self, batch, batch_idx)

    arguments = small("copy", f"hydra.run.dir={tmp_path / 'here'}", "datamodule.eval_batch_size=5")
    monkeypatch.setattr(SequenceTraining, name, stop)
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with hydra_restored():
        assert run.run(sys.argv) == 143
    summary = read_summary(tmp_path / "here" / "sequence_training.json")
    done = 1 if stage == "training" else 5
    assert (summary.steps_done, summary.complete, summary.test) == (done, done == 5, None)
    monkeypatch.setattr(SequenceTraining, name, take)
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments, "train.resume=true"])
    with hydra_restored():
        assert run.run(sys.argv) == 0
    summary = read_summary(tmp_path / "here" / "sequence_training.json")
    assert summary.complete
    assert summary.test is not None


def test_a_multirun_that_sigterm_ends_and_its_resumption(tmp_path, monkeypatch):
    take = SequenceTraining.training_step

    def stop(self, batch, batch_idx):
        signal.raise_signal(signal.SIGTERM)
        return take(self, batch, batch_idx)

    sweep = tmp_path / "sweep"
    command = ["run.py", "-m", *small("copy", "model/attention=full,sblocal", f"hydra.sweep.dir={sweep}")]
    monkeypatch.setattr(SequenceTraining, "training_step", stop)
    monkeypatch.setattr(sys, "argv", command)
    with hydra_restored():
        assert run.run(sys.argv) == 143
    # a path of one training's checkpoint would be refused by the others
    hint = f"The same command with train.resume=true hydra.sweep.dir={sweep} resumes it."
    assert hint in (sweep / "0" / "run.log").read_text()
    monkeypatch.setattr(SequenceTraining, "training_step", take)
    monkeypatch.setattr(sys, "argv", [*command, "train.resume=true"])
    with hydra_restored():
        assert run.run(sys.argv) == 0
    summaries = [read_summary(sweep / number / "sequence_training.json") for number in "01"]
    assert [(each.attention, each.complete) for each in summaries] == [("full", True), ("sblocal", True)]


@pytest.mark.parametrize(
    ("name", "stopped"), [("on_train_start", True), ("on_validation_epoch_end", True), ("on_test_epoch_end", False)]
)
def test_sigterm_outside_of_steps(name, stopped, tmp_path, monkeypatch):
    """Before the first step, and where Lightning no longer looks for it."""
    call = getattr(SequenceTraining, name)

    def stop(self):
        signal.raise_signal(signal.SIGTERM)
        return call(self)

    arguments = small("copy", f"hydra.run.dir={tmp_path / 'here'}")
    monkeypatch.setattr(SequenceTraining, name, stop)
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with hydra_restored():
        assert run.run(sys.argv) == 143
    summary = read_summary(tmp_path / "here" / "sequence_training.json")
    assert (summary.complete, summary.test is None) == (not stopped, stopped)


def test_missing_data_end_in_one_message(tmp_path, capsys, monkeypatch):
    arguments = ["run.py", "experiment=lra-text", *SMALL, f"hydra.run.dir={tmp_path / 'here'}"]
    monkeypatch.setattr(sys, "argv", [*arguments, f"datamodule.read.data_dir={tmp_path / 'nothing'}"])
    with hydra_restored():
        assert run.run(sys.argv) == 1
    message = f"Error: {tmp_path / 'nothing'} does not exist. Give the folder with train/ and test/, each with pos/ "
    assert capsys.readouterr().err == message + "and neg/, by datamodule.read.data_dir.\n"


def test_a_training_with_other_options_or_data_is_not_resumed(training):
    training("one")
    with pytest.raises(UserError, match=r"one holds a training already\. train\.resume=true resumes it"):
        training("one")
    with pytest.raises(UserError, match=r"was trained with optimizer\.lr=0\.0016 \(now 0\.1\)"):
        training("one", "train.resume=true", "optimizer.lr=0.1")
    with pytest.raises(UserError, match=r"was trained with data=\w+ \(now \w+\)"):
        training("one", "train.resume=true", "datamodule.read.seed=1")


def test_it_learns(training):
    options = ("train.steps=200", "train.eval_steps=100", "optimizer.lr=0.01", "datamodule.read.num_words=4")
    options += ("datamodule.length=8", "model.dim=32")
    summary, _ = training("copy", *options, experiment="copy")
    assert summary.data["baselines"] == {"chance": 4}
    assert summary.history[0]["train_loss"] > summary.history[1]["train_loss"]
    assert summary.test["perplexity"] < 2
    assert summary.test["accuracy"] > 0.6


def test_the_first_loss_is_that_of_the_weights_as_they_were_drawn(training):
    options = ("train.steps=1", "model.dropout=0")
    summary, objects = training("one", *options, "optimizer.lr=1e-12")
    (batch,) = objects.datamodule.train_dataloader() if objects.trainer.global_step == 0 else [None]
    assert batch is None
    objects.datamodule.trainer = None
    (tokens, lengths, targets) = next(iter(objects.datamodule.train_dataloader()))
    loss = F.cross_entropy(objects.model(tokens, lengths), targets).item()
    assert summary.history[0]["train_loss"] == pytest.approx(loss, rel=1e-5)


def test_a_training_that_diverges_leaves_its_results(training, monkeypatch, tmp_path):
    take = SequenceTraining.training_step

    def diverge(self, batch, batch_idx):
        return take(self, batch, batch_idx) * (math.nan if self.global_step == 2 else 1.0)

    monkeypatch.setattr(SequenceTraining, "training_step", diverge)
    with pytest.raises(UserError, match=r"became nan at update 4.*Lower optimizer\.lr, lengthen the warm-up"):
        training("one")
    summary = read_summary(tmp_path / "one" / "sequence_training.json")
    assert "became nan at update 4" in summary.error
    assert (summary.complete, summary.steps_done, summary.test) == (False, 4, None)
    assert [entry["step"] for entry in summary.history] == [2]
    comparison = compare_trainings.compare_trainings([tmp_path])
    assert "| full | 1 | 100.0 % | 4 of 5 | diverged | - |" in comparison_markdown(comparison)


def test_a_training_that_diverges_before_it_is_saved_leaves_its_results(training, monkeypatch, tmp_path):
    take = SequenceTraining.training_step
    monkeypatch.setattr(SequenceTraining, "training_step", lambda *arguments: take(*arguments) * math.nan)
    with pytest.raises(UserError, match=r"became nan at update 2"):
        training("one")
    summary = read_summary(tmp_path / "one" / "sequence_training.json")
    assert (summary.steps_done, summary.history, summary.tokens_per_second) == (2, [], None)


def test_the_network_is_compiled(training, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: compiled.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(options) or model)
    _, objects = training("one", "train.compile=true")
    assert compiled == ["reset", {"dynamic": False}]
    assert not objects.datamodule._placed  # what lay on the device


def test_bfloat16_runs(training):
    summary, _ = training("one", "trainer.precision=bf16-mixed", "model/attention=sblocal")
    assert summary.precision == "bf16-mixed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("train.steps=0",), r"train\.steps=0 is not valid"),
        (("train.eval_steps=a",), r"train\.eval_steps=a is not valid|train\.eval_steps='a' is not valid"),
        (("optimizer.lr=0",), r"optimizer\.lr=0 is not valid"),
        (("scheduler.decay=cosin",), r"scheduler\.decay=cosin is unknown"),
        (("scheduler.warmup=2",), r"scheduler\.warmup=2 is not valid"),
        (("model.pool=none",), r"model\.pool=none, but the data has a target for each sequence"),
        (("+trainer.max_steps=3",), r"no trainer\.max_steps"),
        (("callbacks.last=null",), r"without callbacks\.last saves nothing"),
        (("trainer.gradient_clip_val=-1",), r"trainer\.gradient_clip_val=-1 is not valid"),
        (("model.attention=sblocal",), r"model\.attention=sblocal is not valid\. Choose .* by model/attention=NAME"),
        (("model.attention=null",), r"model\.attention=None is not valid"),
        (("train.max_time=5",), r"train\.max_time=5 is not valid"),
    ],
)
def test_what_is_not_valid_is_refused(training, options, message):
    with pytest.raises(UserError, match=message):
        training("one", *options)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ...")],
)
def test_lack_of_memory_on_the_cpu_names_the_batch_size(training, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(SequenceTraining, "training_step", fail)
    with pytest.raises(UserError, match=r"The memory is too small\. Lower datamodule\.batch_size \(now 8\)"):
        training("one")


def test_several_devices_are_refused(tmp_path):
    config = compose_config(small("lra-listops", "trainer.devices=2"), tmp_path)
    trainer = type("Trainer", (), {"world_size": 2, "callbacks": [_last(config)]})
    with pytest.raises(UserError, match=r"runs on one device, not on 2\. Give trainer\.devices=1"):
        module._train(config, trainer)


def _last(config):
    return module.LastCheckpoint(str(config.paths.output_dir))


# Parts ----------------------------------------------------------------------------------------------------------------


def test_learning_rate():
    cosine = warmup_and_decay(1000, warmup=0.05)
    assert [cosine(step) for step in (25, 50, 525, 1000)] == pytest.approx([0.5, 1, 0.5, 0])
    rsqrt = warmup_and_decay(5000, warmup=0.2, decay="rsqrt")
    assert [rsqrt(step) for step in (1, 500, 1000, 4000)] == pytest.approx([1e-3, 0.5, 1, 0.5])
    assert warmup_and_decay(3, warmup=0.05)(1) == 1


def test_scores_of_tokens_and_of_sequences():
    logits = torch.zeros(2, 4, 256)
    logits[1, :, 0] = 100.0
    targets = torch.tensor([[IGNORED, 5, 6, 7], [IGNORED, 0, 0, 1]])
    loss, accuracy = sample_scores(logits, targets)
    torch.testing.assert_close(loss, torch.tensor([math.log(256), 100 / 3]))
    torch.testing.assert_close(accuracy, torch.tensor([0.0, 2 / 3]))
    bits = summarise([(loss[:1], accuracy[:1])], "bits_per_byte")
    assert bits["bits_per_byte"] == pytest.approx(8)
    assert bits["standard_error"] == 0
    two = summarise(
        [(torch.tensor([1.0]), torch.tensor([1.0])), (torch.tensor([3.0]), torch.tensor([0.0]))], "perplexity"
    )
    assert two["perplexity"] == pytest.approx(math.exp(2))
    assert two["standard_error"] == pytest.approx(math.exp(2) * 1)
    loss, accuracy = sample_scores(torch.tensor([[0.0, 0.0], [0.0, 9.0]]), torch.tensor([1, 1]))
    torch.testing.assert_close(loss[0], torch.tensor(math.log(2)))
    assert accuracy.tolist() == [0, 1]
