"""A training that is stopped in any way and resumed: exactly as an uninterrupted one, or refused."""

from __future__ import annotations

import copy
import functools
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageOps

import src.tasks.classification_training as training_module
from scatterbrain.errors import UserError
from src.models.t2t_vit import create_t2t_vit
from src.tasks.classification_training import ClassificationTraining
from src.tasks.train import train
from src.tasks.training_checkpoints import content_checksum
from tests.src.distributed.process_functions import kill_at_each_write, train_until_killed
from tests.src.tasks.conftest import NUM_IMAGES, NUM_TRAINING_IMAGES
from tests.src.tasks.setup import (
    IMAGE_SIZE,
    NUM_CLASSES,
    TRAINING_VARIANT,
    assert_same_training,
    make_checkpoint,
    read_last,
    stop_at,
    watch,
    without_times,
)

BATCHES = NUM_TRAINING_IMAGES // 4
SEED = 42


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Resuming exactly


@pytest.mark.parametrize(
    ("options", "total", "stops"),
    [
        # two updates an epoch, of two batches and of one
        (
            {"model___t2tattn_cfg": "sblocal", "trainer__accumulate_grad_batches": 2, "train__redraw_steps": 2},
            6,
            (2, 3, 5),
        ),
        (
            {
                "model___t2tattn_cfg": "performer",
                "train__redraw_steps": 5,
                "train__epochs": 4,
                "scheduler__step_on_epochs": "false",
                "trainer__check_val_every_n_epoch": 2,
            },
            4 * BATCHES,
            (3, 6, 8),
        ),
    ],
    ids=["accumulated", "by_update"],
)
def test_a_training_that_was_stopped_ends_as_one_that_was_not(
    training, training_data, monkeypatch, tmp_path, options, total, stops
):
    options = {"model__drop_rate": 0.1, **options}
    at_once, _ = train(training("at_once", **options))
    assert (at_once.updates, at_once.complete) == (total, True)

    (tmp_path / "moved").symlink_to(training_data)
    stopped, _ = train(training("stopped", **options, train__resume="true", train__max_time="00:00:00"))
    assert (stopped.updates, stopped.complete) == (1, False)
    for number, update in enumerate(stops):
        changes = {"data": tmp_path / "moved", "datamodule__num_workers": number % 2, "train__resume": "true"}
        with monkeypatch.context() as patch:
            stop_at(patch, update)
            stopped, _ = train(training("stopped", **options, **changes))
        assert (stopped.updates, stopped.complete) == (update, False)
    finished, _ = train(training("stopped", **options, train__resume="true"))
    assert (finished.updates, finished.complete) == (total, True)

    for name in ("last.ckpt", "best.ckpt"):
        assert_same_training(read_last(tmp_path / "at_once", name), read_last(tmp_path / "stopped", name))
    assert without_times(at_once.history) == without_times(finished.history)
    losses = {entry["train_loss"] for entry in at_once.history}
    assert len(losses) == len(at_once.history)  # or equal histories would say little

    # drawn before the first update that follows
    model = create_t2t_vit(TRAINING_VARIANT, options["model___t2tattn_cfg"], IMAGE_SIZE, NUM_CLASSES)
    model.redraw_projections(SEED + (total - 1) // options["train__redraw_steps"])
    rows = {key: rows for key, rows in model.state_dict().items() if key.endswith("projection_matrix")}
    last = read_last(tmp_path / "at_once")
    for state in (last["state_dict"], last["current_model_state"]):
        assert len(rows) == 2
        for key, drawn in rows.items():
            assert torch.equal(state[f"model.{key}"], drawn)


def test_seconds_are_those_of_the_whole_epoch(training, monkeypatch):
    now = [0.0]
    step = ClassificationTraining.training_step

    def training_step(self, batch, batch_idx):
        now[0] += 10
        return step(self, batch, batch_idx)

    monkeypatch.setattr(training_module, "seconds_now", lambda device: now[0])
    monkeypatch.setattr(ClassificationTraining, "training_step", training_step)
    with monkeypatch.context() as patch:
        stop_at(patch, BATCHES + 2)
        train(training())
    now[0] += 1000  # until somebody comes back
    summary, _ = train(training(train__resume="true"))
    assert [entry["seconds"] for entry in summary.history] == 3 * [10 * BATCHES]
    assert [entry["images_per_second"] for entry in summary.history] == 3 * [0.4]
    assert (summary.seconds, summary.images_per_second) == (30 * BATCHES, 0.4)


def test_a_process_that_is_killed_while_it_writes(training, tmp_path):
    train(training("at_once"))
    config = training("killed", callbacks__last__minutes_between=1e-9)
    contents = OmegaConf.to_container(config, resolve=True)
    # each update is saved, the first epoch's last one by two callbacks
    process = multiprocessing.get_context("spawn").Process(target=train_until_killed, args=(contents, BATCHES + 3))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    checkpoints = tmp_path / "killed" / "checkpoints"
    assert len(list(checkpoints.glob(".*.tmp"))) == 1
    assert read_last(tmp_path / "killed")["global_step"] == BATCHES + 1
    train(training("killed", train__resume="true"))
    assert_same_training(read_last(tmp_path / "at_once"), read_last(tmp_path / "killed"))


def test_a_process_that_is_killed_while_it_writes_results(training, monkeypatch, tmp_path):
    """At each of its last changes of files: a resume leaves what an uninterrupted training leaves, nothing else."""
    with monkeypatch.context() as patch:
        stop_at(patch, BATCHES + 2)
        train(training())  # leaves a training.json that is not complete, and a figure
    assert not json.loads((tmp_path / "run" / "training.json").read_text())["complete"]
    killed = tmp_path / "killed"
    killed.mkdir()
    contents = OmegaConf.to_container(training(train__resume="true"))
    process = multiprocessing.get_context("spawn").Process(target=kill_at_each_write, args=("train", contents, killed))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    names = contents_of(tmp_path / "run").keys()
    last = read_last(tmp_path / "run")
    # two files, empty and complete under their temporary names, and the removal of the old figure and of the lock
    assert len(list(killed.glob("*/.*.tmp"))) == 4
    assert len(list(killed.iterdir())) == 6
    for folder in killed.iterdir():
        train(training(f"killed/{folder.name}", train__resume="true"))
        assert contents_of(folder).keys() == names
        assert_same_training(read_last(folder), last)
        content = json.loads((folder / "training.json").read_text())
        assert (content["complete"], content["updates"], len(content["history"])) == (True, 3 * BATCHES, 3)
        assert (folder / "training.png").read_bytes() == (tmp_path / "run" / "training.png").read_bytes()


def test_in_another_folder_the_best_checkpoint_is_copied(training, monkeypatch, tmp_path, recwarn):
    watch(monkeypatch, 20.0, 10.0, 30.0)
    for update, folder in ((BATCHES + 1, "first"), (2 * BATCHES + 1, "second"), (None, "third")):
        previous = {"second": "first", "third": "second"}.get(folder)
        changes = {} if previous is None else {"train__resume": tmp_path / previous / "checkpoints" / "last.ckpt"}
        before = previous and contents_of(tmp_path / previous)
        with monkeypatch.context() as patch:
            if update is not None:
                stop_at(patch, update)
            summary, _ = train(training(folder, **changes))
        assert summary.best == ({"epoch": 3, "top1": 30.0} if folder == "third" else {"epoch": 1, "top1": 20.0})
        assert summary.checkpoints["best"] == str(tmp_path / folder / "checkpoints" / "best.ckpt")
        assert len(read_last(tmp_path / folder, "best.ckpt")["training"]["history"]) == summary.best["epoch"]
        if previous:
            assert contents_of(tmp_path / previous) == before
    assert not [str(warning.message) for warning in recwarn if issubclass(warning.category, UserWarning)]


def test_a_finished_training_is_left_as_it_is(training, monkeypatch, tmp_path):
    first, _ = train(training(logger="csv"))
    before = contents_of(tmp_path / "run")
    assert {"training.json", "training.png", "checkpoints/last.ckpt", "csv/metrics.csv"} <= before.keys()
    monkeypatch.setattr("sys.argv", ["another", "command"])
    again, objects = train(training(logger="csv", train__resume="true"))
    assert contents_of(tmp_path / "run") == before
    assert (again.complete, again.updates, again.history) == (True, first.updates, first.history)
    averaged = read_last(tmp_path / "run")["state_dict"]
    assert torch.equal(objects.model.head.weight, averaged["model.head.weight"])


def test_metrics_of_the_csv_logger_are_kept(training, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        stop_at(patch, BATCHES + 1)
        train(training(logger="csv"))
    first = (tmp_path / "run" / "csv" / "metrics.csv").read_text()
    assert "val/top1" in first
    train(training(logger="csv", train__resume="true"))
    assert (tmp_path / "run" / "csv" / f"metrics_to_{BATCHES + 1}.csv").read_text() == first
    assert "val/top1" in (tmp_path / "run" / "csv" / "metrics.csv").read_text()


# Stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_current_update(training, monkeypatch, tmp_path, number):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        stop_at(patch, 3, number)
        # the signal comes in the first of the update's two batches
        config = training(trainer__accumulate_grad_batches=2)
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                train(config)
        else:
            train(config)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert read_last(tmp_path / "run")["global_step"] == 3
    content = json.loads((tmp_path / "run" / "training.json").read_text())
    assert (content["complete"], content["updates"], len(content["history"])) == (False, 3, 1)


def test_a_signal_in_the_last_update_stops_nothing(training, monkeypatch, tmp_path):
    stop_at(monkeypatch, 3 * BATCHES)
    summary, _ = train(training())
    assert (summary.complete, summary.updates) == (True, 3 * BATCHES)
    assert json.loads((tmp_path / "run" / "training.json").read_text())["complete"]


def test_the_message_says_how_to_resume(training, tmp_path, caplog):
    with caplog.at_level("INFO"):
        train(training(train__max_time="00:00:00"))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert f"stopped after 1 updates because its time is up. The same command with train.resume={last}" in caplog.text


def test_two_interrupts_stop_at_once(training, monkeypatch, tmp_path):
    step = ClassificationTraining.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == BATCHES + 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationTraining, "training_step", training_step)
    with pytest.raises(KeyboardInterrupt):
        train(training())
    assert read_last(tmp_path / "run")["global_step"] == BATCHES
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# What is refused


def test_a_folder_that_holds_a_training(training, tmp_path):
    train(training(train__max_time="00:00:00"))
    before = contents_of(tmp_path / "run")
    for resume in ("false", tmp_path / "other.ckpt"):
        with pytest.raises(
            UserError, match=r"run holds a training already. train.resume=true resumes it.*hydra.run.dir"
        ):
            train(training(train__resume=resume))
    assert contents_of(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 3}, ["seed=42 (now 3)"]),
        ({"datamodule__class_order": "natural"}, ["datamodule.class_order=sorted (now natural)"]),
        ({"model__drop_path_rate": 0.3}, ["model.drop_path_rate=0.1 (now 0.3)"]),
        ({"model__t2tattn1_cfg__nb_features": 4}, ["model.t2tattn1_cfg.nb_features=None (now 4)"]),
        (
            {"model___t2tattn_cfg": "local"},
            ["t2tattn1_cfg.name=sblocal (now local)", "t2tattn1_cfg.row_norm=chi (now None"],
        ),
        (
            {"optimizer__lr": 0.1, "optimizer__opt": "sgd"},
            ["optimizer.lr=0.01 (now 0.1)", "optimizer.opt=adamw (now sgd)"],
        ),
        ({"scheduler__min_lr": 0}, ["scheduler.min_lr=1e-05 (now 0)"]),
        ({"train__epochs": 4}, ["train.epochs=3 (now 4)"]),
        ({"train__ema_decay": "null"}, ["train.ema_decay=0.5 (now None)"]),
        ({"train__redraw_steps": 2}, ["train.redraw_steps=None (now 2)"]),
        ({"trainer__accumulate_grad_batches": 2}, ["trainer.accumulate_grad_batches=1 (now 2)"]),
        ({"trainer__precision": "bf16-mixed"}, ["trainer.precision=32-true (now bf16-mixed)"]),
        ({"datamodule__batch_size": 2}, ["datamodule.batch_size=4 (now 2)"]),
        ({"datamodule__holdout": 0.5}, ["datamodule.holdout=0.0 (now 0.5)"]),
        ({"datamodule__augmentation__scale": "[0.5,1]"}, ["datamodule.augmentation.scale=[0.08, 1.0] (now [0.5, 1])"]),
        (
            {"datamodule__on_device": "true", "datamodule__augmentation__auto_augment": "null"},
            ["datamodule.on_device=False (now True)", "auto_augment=rand-m9-mstd0.5-inc1 (now None)"],
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_other_options_than_before(training, stopped_training, tmp_path, changes, told):
    resume = stopped_training / "checkpoints" / "last.ckpt"
    options = {"model___t2tattn_cfg": "sblocal", "train__resume": resume, **changes}
    with pytest.raises(UserError) as caught:
        train(training(**options))
    message = str(caught.value)
    assert message.startswith(f"{resume} was trained with ")
    assert message.endswith(
        f"Give the same options to resume; or start again from its weights with train.ckpt={resume}."
    )
    for part in told:
        assert part in message
    # options that follow from the seed, and those of the second stage, are told as well
    others = 2 if changes.keys() & {"seed", "model___t2tattn_cfg"} else 0
    assert message.count("(now") == len(told) + others
    assert not contents_of(tmp_path / "run")


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("change", ["fewer", "renamed", "inverted"])
def test_other_images_than_before(training, training_data, tmp_path, finished, split, change):
    train(training(**({} if finished else {"train__max_time": "00:00:00"})))
    before = contents_of(tmp_path / "run")
    shutil.copytree(training_data, tmp_path / "other")
    image = tmp_path / "other" / split / "c0" / "000.png"
    if change == "inverted":
        ImageOps.invert(Image.open(image).convert("RGB")).save(image)
    else:
        image.unlink() if change == "fewer" else image.rename(image.with_name("other.png"))
    with pytest.raises(UserError) as caught:
        train(training(data=tmp_path / "other", train__resume="true"))
    name = {"train": "train", "val": "validation"}[split]
    number = {"train": NUM_TRAINING_IMAGES, "val": NUM_IMAGES}[split]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    message = str(caught.value)
    assert message.startswith(
        f"{last} was trained on other images than those of datamodule.data_dir={tmp_path / 'other'}: {name}."
    )
    assert (f"{name}.num_images={number} (now {number - 1})" in message) == (change == "fewer")
    # numbers, names, contents
    assert message.count("(now") == {"fewer": 3, "renamed": 2, "inverted": 1}[change]
    assert message.endswith(f"Give the same images to resume; or start again from its weights with train.ckpt={last}.")
    assert contents_of(tmp_path / "run") == before


@pytest.mark.parametrize("finished", [False, True])
def test_other_weights_to_start_from_than_before(training, tmp_path, finished):
    weights = make_checkpoint(tmp_path / "weights.pth", TRAINING_VARIANT)
    limit = {} if finished else {"train__max_time": "00:00:00"}
    make = functools.partial(training, train__resume="true")
    config = training(train__ckpt=weights, **limit)
    make_checkpoint(weights, TRAINING_VARIANT)
    train(config)
    before = contents_of(tmp_path / "run")
    shutil.copy(weights, tmp_path / "moved.pth")
    content = torch.load(weights, weights_only=True)
    content["state_dict_ema"]["head.bias"] += 1
    torch.save(content, tmp_path / "other.pth")
    for ckpt, told in (("null", "None"), (tmp_path / "other.pth", tmp_path / "other.pth")):
        with pytest.raises(UserError, match=rf"was trained with train.ckpt={weights} \(now {told}\). Give the same"):
            train(make(train__ckpt=ckpt))
    torch.save(content, weights)
    with pytest.raises(UserError, match=f"was trained with other weights in train.ckpt={weights}. Give the same"):
        train(make(train__ckpt=weights))
    with pytest.raises(UserError, match=r"was trained with train.new_head=False \(now True\)"):
        train(make(train__ckpt=tmp_path / "moved.pth", train__new_head="true"))
    assert contents_of(tmp_path / "run") == before
    summary, _ = train(make(train__ckpt=tmp_path / "moved.pth"))
    assert (summary.complete, summary.started_from["path"]) == (True, str(weights))


def test_other_options_than_those_of_a_finished_training(training, tmp_path):
    train(training())
    before = contents_of(tmp_path / "run")
    for changes, told in (
        ({"seed": 3}, r"seed=42 \(now 3\)"),
        ({"train__epochs": 2}, r"train.epochs=3 \(now 2\)"),
        ({"train__epochs": 4, "optimizer__lr": 0.1}, r"trained with optimizer.lr=0.01 \(now 0.1\). Give the same"),
        ({"trainer__gradient_clip_val": 1}, r"trainer.gradient_clip_val=None \(now 1\)"),
        ({"+trainer__gradient_clip_algorithm": "value"}, r"trainer.gradient_clip_algorithm=None \(now value\)"),
        ({"trainer__precision": "bf16-mixed"}, "trainer.precision=32-true"),
    ):
        with pytest.raises(UserError, match=rf"last.ckpt was (?=trained with ).*{told}"):
            train(training(train__resume="true", **changes))
    assert contents_of(tmp_path / "run") == before


@pytest.mark.parametrize("by_epochs", ["true", "false"])
def test_a_finished_training_is_extended(training, monkeypatch, tmp_path, caplog, by_epochs):
    """With the learning rates of a training of that length from there on; it can be stopped and resumed in turn."""
    options = {"scheduler__step_on_epochs": by_epochs}
    rates = {}
    step = ClassificationTraining.training_step

    def training_step(self, batch, batch_idx):
        rates[self.global_step] = self._learning_rate()
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationTraining, "training_step", training_step)
    train(training("at_once", **options, train__epochs=5))
    expected = dict(rates)
    first, _ = train(training(**options))
    assert rates[2 * BATCHES] != expected[2 * BATCHES]
    rates.clear()
    options |= {"train__epochs": 5, "train__resume": "true"}
    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        stop_at(patch, 4 * BATCHES)
        stopped, _ = train(training(**options))
    assert "finished after 3 epochs and is extended to train.epochs=5: the learning rate follows" in caplog.text
    assert (stopped.complete, stopped.epochs) == (False, 5)
    with pytest.raises(UserError, match=r"train.epochs=5 \(now 6\)"):
        train(training(**{**options, "train__epochs": 6}))
    summary, _ = train(training(**options))
    assert rates == {update: rate for update, rate in expected.items() if update >= 3 * BATCHES}
    assert (summary.complete, summary.updates, len(summary.history)) == (True, 5 * BATCHES, 5)
    assert without_times(summary.history[:3]) == without_times(first.history)
    content = json.loads((tmp_path / "run" / "training.json").read_text())
    assert (content["epochs"], content["updates"], content["complete"]) == (5, 5 * BATCHES, True)


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("missing.ckpt", "There is no checkpoint .*missing.ckpt. Give train.resume the file last.ckpt"),
        (".", "There is no checkpoint"),
        ("fifo.ckpt", "fifo.ckpt is not a regular file. Give train.resume the file last.ckpt"),
        ("empty.ckpt", "empty.ckpt is damaged, or is no checkpoint. Resume from another one, or start again"),
        ("cut.ckpt", "cut.ckpt is damaged"),
        ("text.ckpt", "text.ckpt .* is no checkpoint"),
        ("list.ckpt", "list.ckpt is no checkpoint of a training"),
        ("weights.pth", "weights.pth is no checkpoint of a training .*give train.ckpt=.*weights.pth"),
        ("code.ckpt", "code.ckpt holds code, which was not run"),
    ],
)
def test_a_file_that_cannot_be_gone_on_from(training, stopped_training, tmp_path, name, fault):
    config = training(train__resume=tmp_path / name)
    whole = (stopped_training / "checkpoints" / "last.ckpt").read_bytes()
    os.mkfifo(tmp_path / "fifo.ckpt")
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.ckpt").write_text("not a checkpoint at all")
    torch.save([1, 2], tmp_path / "list.ckpt")
    make_checkpoint(tmp_path / "weights.pth", TRAINING_VARIANT)
    torch.save({"loops": {}, "optimizer_states": [], "training": Malicious(tmp_path / "ran")}, tmp_path / "code.ckpt")
    with pytest.raises(UserError, match=fault) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


EDITS = {
    "missing_weight": lambda last: last["current_model_state"].pop("model.head.bias"),
    "missing_averaged_weight": lambda last: last["state_dict"].pop("model.head.bias"),
    "wrong_shape": lambda last: last["current_model_state"].update({"model.head.bias": torch.zeros(3)}),
    "huge_shape": lambda last: last["current_model_state"].update(
        {"model.head.bias": torch.zeros(1).expand(10**6, 10**6)}
    ),
    "nested": lambda last: last.update(more=torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])),
    "sparse": lambda last: last.update(more=torch.eye(2).to_sparse()),
    "one_value": lambda last: last["current_model_state"]["model.head.bias"].add_(1),
    "nan": lambda last: last["current_model_state"]["model.head.bias"].fill_(torch.nan),
    "nan_average": lambda last: last["state_dict"]["model.head.bias"].fill_(torch.nan),
    "no_average": lambda last: last.pop("averaging_state"),
    "empty_average": lambda last: last["averaging_state"].clear(),
    "no_optimizer": lambda last: last["optimizer_states"].clear(),
    "empty_optimizer": lambda last: last["optimizer_states"][0].clear(),
    "other_optimizer": lambda last: last["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(2)),
    "no_schedule": lambda last: last["lr_schedulers"].clear(),
    "no_callbacks": lambda last: last["callbacks"].clear(),
    "no_loops": lambda last: last["loops"].clear(),
    "other_loops": lambda last: last.update(loops=3),
    "version": lambda last: last.update({"pytorch-lightning_version": "abc"}),
    "no_version": lambda last: last.pop("pytorch-lightning_version"),
    "updates": lambda last: last.update(global_step=last["global_step"] + 1),
    "epoch": lambda last: last.update(epoch="a"),
    "history": lambda last: last["training"].update(history=[{}]),
    "no_checksum": lambda last: last.pop("checksum"),
    "other_checksum": lambda last: last.update(checksum=3),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants", "ignore:The PyTorch API of nested tensors")
def test_a_checkpoint_that_was_edited(training, stopped_training, tmp_path, name):
    content = read_last(stopped_training)
    EDITS[name](content)
    torch.save(content, tmp_path / "edited.ckpt")
    config = training(model___t2tattn_cfg="sblocal", train__resume=tmp_path / "edited.ckpt")
    with pytest.raises(
        UserError, match=r"edited.ckpt is damaged or was edited.* Resume from another one, or"
    ) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert not contents_of(tmp_path / "run")


def test_a_checkpoint_that_was_only_stored_again(training, stopped_training, tmp_path):
    torch.save(read_last(stopped_training), tmp_path / "stored.ckpt")
    options = {"model___t2tattn_cfg": "sblocal", "train__epochs": 3, "train__resume": tmp_path / "stored.ckpt"}
    summary, _ = train(training(**options))
    assert (summary.complete, summary.updates) == (True, 3 * BATCHES)


def test_the_checksum_is_of_the_content():
    content = {"a": [torch.ones(2), (1, 2.5)], "b": {"c": None, "d": {"x", "y"}}, "e": torch.ones(0)}
    checksum = content_checksum(content)
    assert checksum == content_checksum(copy.deepcopy(content))
    for changed in (
        {**content, "a": [torch.ones(2).double(), (1, 2.5)]},
        {**content, "a": [torch.ones(2, 1), (1, 2.5)]},
        {**content, "a": [torch.ones(2), [1, 2.5]]},
        {**content, "a": [torch.ones(2), (1, 2.0)]},
        {**content, "b": {"c": "None", "d": {"x", "y"}}},
        {key: content[key] for key in ("a", "b")},
    ):
        assert content_checksum(changed) != checksum
