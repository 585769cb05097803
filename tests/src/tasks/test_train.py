"""Trainings in this process: weights, rates and metrics against what is computed by hand, and every option."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import re
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import WeightAveraging

from scatterbrain.errors import UserError
from src.checkpoints import load_checkpoint
from src.datamodules.dataset import ImageDataset
from src.distributed.processes import run_processes
from src.models.t2t_vit import T2TViT, create_t2t_vit, sinusoid_table
from src.tasks.classification_training import ClassificationTraining
from src.tasks.evaluate import evaluate
from src.tasks.train import train, warn_of_short_average
from src.utils.files import sha256_of_file
from src.utils.instantiate import build
from tests.src.datamodules import format_files
from tests.src.distributed.process_functions import train_in_turn
from tests.src.tasks.conftest import NUM_IMAGES, NUM_TRAINING_IMAGES, make_tiny
from tests.src.tasks.setup import (
    CONFIG_DIR,
    IMAGE_SIZE,
    NUM_CLASSES,
    SEQUENCE_EXPERIMENTS,
    TRAINING_VARIANT,
    assert_same_training,
    compose_config,
    make_checkpoint,
    make_images,
    overrides,
    read_last,
    stop_at,
    training_overrides,
    watch,
    without_times,
)

BATCHES = NUM_TRAINING_IMAGES // 4
SEED = 42


@pytest.fixture
def evaluation_of(training_data, tmp_path):
    """`evaluation_of(training, into, **changes)`: the configuration that evaluates its last checkpoint."""

    def build(folder, into="evaluation", **changes):
        arguments = overrides(training_data, folder / "checkpoints" / "last.ckpt", TRAINING_VARIANT, **changes)
        return compose_config(arguments, tmp_path / into)

    return build


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def watched(monkeypatch):
    """What a training does: `start` (the weights it begins with), `rates` and `weights` of each update, `batches`."""

    class Watched:
        def __init__(self) -> None:
            self.start, self.rates, self.weights, self.batches = {}, [], [], []

    seen = Watched()
    start, before, step, end = (
        getattr(ClassificationTraining, name)
        for name in ("on_train_start", "on_before_optimizer_step", "training_step", "on_train_batch_end")
    )

    def on_train_start(self):
        seen.start = weights_of(self.model)
        start(self)

    def on_before_optimizer_step(self, optimizer):
        seen.rates.append(optimizer.param_groups[0]["lr"])
        before(self, optimizer)

    def training_step(self, batch, batch_idx):
        seen.batches.append(batch)
        return step(self, batch, batch_idx)

    def on_train_batch_end(self, *arguments):
        if len(seen.weights) < self.global_step:
            seen.weights.append(weights_of(self.model))
        end(self, *arguments)

    for hook in (on_train_start, on_before_optimizer_step, training_step, on_train_batch_end):
        monkeypatch.setattr(ClassificationTraining, hook.__name__, hook)
    return seen


# Weights


@pytest.mark.parametrize("attention", ["full", "local", "performer", "sblocal"])
def test_what_was_watched_is_what_is_evaluated(training, evaluation_of, monkeypatch, tmp_path, attention):
    options = {"model___t2tattn_cfg": attention, "train__epochs": 2}
    if attention in ("performer", "sblocal"):
        options["train__redraw_steps"] = 2
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        stopped, _ = train(training(**options))
    assert (stopped.updates, stopped.best) == (2, None)
    summary, objects = train(training(**options, train__resume="true"))
    assert (summary.updates, summary.attention) == (2 * BATCHES, attention)

    results, _ = evaluate(evaluation_of(tmp_path / "run", model___t2tattn_cfg=attention))
    last = summary.history[-1]
    assert results.data["num_images"] == NUM_IMAGES
    assert (results.top1, results.top5) == pytest.approx((last["val_top1"], last["val_top5"]), rel=1e-6)  # float32
    assert results.loss == pytest.approx(last["val_loss"], rel=1e-6)  # sums in float32 and in float64

    # it is the averaged weights that were watched, and that the model is left with
    checkpoint = read_last(tmp_path / "run")
    averaged, current = (checkpoint[name]["model.head.weight"] for name in ("state_dict", "current_model_state"))
    assert torch.equal(objects.model.head.weight, averaged)
    checkpoint["state_dict"] = checkpoint["current_model_state"]
    torch.save(checkpoint, tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert not torch.equal(averaged, current)
    shifted, _ = evaluate(evaluation_of(tmp_path / "run", "current", model___t2tattn_cfg=attention))
    assert shifted.loss != pytest.approx(last["val_loss"], rel=1e-4)


def test_averaged_weights(training, watched, tmp_path):
    train(training(trainer__accumulate_grad_batches=2))
    assert len(watched.weights) == 6  # two an epoch, of two batches and of one
    expected = watched.weights[0]
    for weights in watched.weights[1:]:
        expected = {name: 0.5 * expected[name] + 0.5 * weight for name, weight in weights.items()}
    checkpoint = read_last(tmp_path / "run")
    for name, weight in expected.items():
        torch.testing.assert_close(checkpoint["state_dict"][f"model.{name}"], weight, rtol=1e-6, atol=1e-7)  # rounding
        assert torch.equal(checkpoint["current_model_state"][f"model.{name}"], watched.weights[-1][name])


def test_without_averaging_the_checkpoint_has_the_current_weights(training, watched, evaluation_of, tmp_path):
    summary, _ = train(training(train__ema_decay="null"))
    checkpoint = read_last(tmp_path / "run")
    assert "current_model_state" not in checkpoint
    assert summary.ema_decay is None
    for name, weight in watched.weights[-1].items():
        assert torch.equal(checkpoint["state_dict"][f"model.{name}"], weight)
    results, _ = evaluate(evaluation_of(tmp_path / "run"))
    assert results.loss == pytest.approx(summary.history[-1]["val_loss"], rel=1e-6)


def test_what_is_decayed_and_what_is_trained(training, watched):
    _, objects = train(training(train__epochs=1, scheduler__warmup_epochs=0))
    names = {id(parameter): name for name, parameter in objects.model.named_parameters()}
    groups = objects.trainer.optimizers[0].param_groups
    decay = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert set(decay) == set(watched.start) - {"pos_embed.pe"}
    for name, value in decay.items():
        is_matrix = watched.start[name].dim() > 1 and name != "cls_token"
        assert value == (0.05 if is_matrix else 0.0), name
    assert {"cls_token", "head.bias", "norm.weight", "blocks.0.mlp.fc1.weight"} <= set(decay)
    before, after = watched.start, watched.weights[-1]
    assert torch.equal(after["pos_embed.pe"], sinusoid_table(*after["pos_embed.pe"].shape[1:]))
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {"pos_embed.pe"}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_random_features_are_drawn_again(training, monkeypatch, accumulate):
    draws, steps = [], []
    start, redraw = ClassificationTraining.on_train_batch_start, T2TViT.redraw_projections

    def on_train_batch_start(self, batch, batch_idx):
        steps.append(self.global_step)
        start(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationTraining, "on_train_batch_start", on_train_batch_start)
    monkeypatch.setattr(
        T2TViT, "redraw_projections", lambda self, seed: draws.append((steps[-1], seed)) or redraw(self, seed)
    )
    options = {"model___t2tattn_cfg": "sblocal", "train__redraw_steps": 2}
    summary, _ = train(training(**options, trainer__accumulate_grad_batches=accumulate))
    # the batches of one update see one draw
    assert list(dict.fromkeys(draws)) == [(step, SEED + step // 2) for step in range(2, summary.updates, 2)]


# Learning rate


@pytest.mark.parametrize("by_update", [False, True], ids=["by_epoch", "by_update"])
@pytest.mark.parametrize(("lr_batch", "scale"), [("null", 1.0), (512, 8 / 512)])
def test_the_schedule(training, watched, by_update, lr_batch, scale):
    options = {
        "train__epochs": 6,
        "train__lr_batch": lr_batch,
        "trainer__accumulate_grad_batches": 2,
        "scheduler__warmup_epochs": 2,
        "scheduler__cooldown_epochs": 1,
        "scheduler__warmup_lr": 1e-3,
        "scheduler__min_lr": 2e-3,
        "scheduler__step_on_epochs": str(not by_update).lower(),
    }
    summary, _ = train(training(**options))
    per_epoch = 2
    unit = per_epoch if by_update else 1  # steps of the schedule in an epoch

    def rate(step: int) -> float:
        if step < 2 * unit:
            return 1e-3 + (0.01 - 1e-3) * step / (2 * unit)
        if step >= 5 * unit:
            return 2e-3
        return 2e-3 + (0.01 - 2e-3) * (1 + math.cos(math.pi * step / (5 * unit))) / 2

    steps = range(6 * per_epoch)
    expected = [scale * rate(step if by_update else step // per_epoch) for step in steps]
    assert watched.rates == pytest.approx(expected, rel=1e-12)
    after = [scale * rate((epoch + 1) * unit) for epoch in range(6)]
    assert [entry["lr"] for entry in summary.history] == pytest.approx(after, rel=1e-12)
    assert (summary.images_per_update, summary.learning_rate) == (8, pytest.approx(scale * 0.01, rel=1e-12))


# Loss


@pytest.mark.parametrize(
    ("precision", "ema_decay", "dtype"),
    [("32-true", 0.5, torch.float32), ("bf16-mixed", 0.5, torch.bfloat16), ("bf16-true", "null", torch.bfloat16)],
)
def test_the_loss_is_of_soft_targets_and_in_float32(training, monkeypatch, precision, ema_decay, dtype):
    seen, heads = [], []
    cross_entropy = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda *args, **kw: seen.append(args) or cross_entropy(*args, **kw)
    )
    step = ClassificationTraining.training_step

    def training_step(self, batch, batch_idx):
        handle = self.model.head.register_forward_hook(lambda module, inputs, output: heads.append(output.dtype))
        loss = step(self, batch, batch_idx)
        handle.remove()
        return loss

    monkeypatch.setattr(ClassificationTraining, "training_step", training_step)
    options = {"train__epochs": 1, "scheduler__warmup_epochs": 0, "train__ema_decay": ema_decay}
    summary, _ = train(training(trainer__precision=precision, **options))
    assert summary.precision == precision
    assert heads == BATCHES * [dtype]

    losses = []
    for logits, targets in seen[:BATCHES]:
        assert (logits.dtype, targets.dtype) == (torch.float32, torch.float32)
        assert targets.shape == (4, NUM_CLASSES)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        assert (targets >= 0.1 / NUM_CLASSES - 1e-7).all()  # smoothed
        losses.append(-(targets.double() * logits.detach().double().log_softmax(-1)).sum(-1).mean())
    assert summary.history[0]["train_loss"] == pytest.approx(float(sum(losses)) / BATCHES, rel=1e-6)  # float32
    watched = torch.cat([cross_entropy(*args, reduction="none") for args in seen[BATCHES:]])
    assert len(watched) == NUM_IMAGES
    assert summary.history[0]["val_loss"] == pytest.approx(float(watched.double().mean()), rel=1e-6)


def test_averaging_in_half_precision_is_refused(training):
    with pytest.raises(UserError, match=r"bf16-true is too coarse for averaged weights.*train.ema_decay=null"):
        train(training(trainer__precision="bf16-true"))


def test_compiled_equals_eager(training):
    options = {"model___t2tattn_cfg": "sblocal", "train__redraw_steps": 2, "train__epochs": 2}
    eager, _ = train(training("eager", **options))
    calls = []
    # "eager" traces and guards as any backend does, which is where draws could go stale, but needs no compiler
    compile_model = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda model: calls.append(model) or compile_model(model, backend="eager"))
        compiled, objects = train(training("compiled", train__compile="true", **options))
    assert calls == [objects.model]
    for ours, theirs in zip(compiled.history, eager.history, strict=True):
        for name in ("train_loss", "val_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_a_compiler_that_fails_is_one_error(training, monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    def compile_model(model):
        def forward(images):
            raise InvalidCxxCompiler

        return forward

    monkeypatch.setattr(torch, "compile", compile_model)
    with pytest.raises(UserError, match=r"torch.compile failed: .*Leave out train.compile=true"):
        train(training(train__compile="true"))


# Where it begins


EXPERIMENTS = {path.stem for path in Path(CONFIG_DIR, "experiment").glob("*.yaml") if "eval" not in path.stem}


@pytest.mark.parametrize("experiment", sorted(EXPERIMENTS - set(SEQUENCE_EXPERIMENTS)))
def test_every_experiment_begins(training, tmp_path, experiment):
    own = ("train.epochs", "train.lr_batch", "train.ema_decay", "optimizer.lr")
    own += ("scheduler.warmup_epochs", "scheduler.cooldown_epochs")
    changes = {name.replace(".", "__"): None for name in own}
    changes |= {"train__compile": "false", "datamodule__test_split": "val", "train__max_time": "00:00:00"}
    if "finetune" in experiment or experiment.startswith("flowers"):
        changes["train__ckpt"] = tmp_path / "weights.pth"
    config = training(experiment=experiment, **changes)
    make_checkpoint(tmp_path / "weights.pth", TRAINING_VARIANT)
    summary, objects = train(config)
    assert (summary.updates, summary.complete) == (1, False)
    assert (summary.epochs, summary.ema_decay) == (config.train.epochs, config.train.ema_decay)
    assert (summary.started_from["path"] is None) == ("train__ckpt" not in changes)
    assert objects.datamodule.on_device == experiment.startswith("flowers")


@pytest.mark.parametrize(("classes", "new_head"), [(NUM_CLASSES, False), (7, True)])
def test_fine_tuning_begins_with_the_weights_of_a_checkpoint(training, watched, tmp_path, classes, new_head):
    options = {"train__ckpt": tmp_path / "weights.pth", "train__new_head": str(new_head).lower()}
    config = training(**options, train__max_time="00:00:00")
    make_checkpoint(tmp_path / "weights.pth", TRAINING_VARIANT, classes)
    train(config)
    start = watched.start
    model = create_t2t_vit(TRAINING_VARIANT, image_size=IMAGE_SIZE, num_classes=classes)
    load_checkpoint(model, tmp_path / "weights.pth")
    train(training("random", train__max_time="00:00:00"))
    for name, weight in model.named_parameters():
        theirs = watched.start[name] if new_head and name.startswith("head.") else weight
        assert torch.equal(start[name], theirs), name

    # the weights that the last checkpoint came from are not needed any more
    started = {"path": str(tmp_path / "weights.pth"), "sha256": sha256_of_file(tmp_path / "weights.pth")}
    (tmp_path / "weights.pth").unlink()
    summary, _ = train(training(**options, train__resume="true"))
    assert summary.started_from == started


def test_another_number_of_classes_needs_a_new_head(training, tmp_path):
    config = training(train__ckpt=tmp_path / "weights.pth")
    make_checkpoint(tmp_path / "weights.pth", TRAINING_VARIANT, 7)
    with pytest.raises(UserError, match=r"weights.pth has 7 classes, but the model has 5 classes") as caught:
        train(config)
    remedy = "use train.new_head=true for a new classifier, or model.num_classes=7 to keep the file's."
    assert str(caught.value).endswith(remedy)


@pytest.mark.parametrize("experiment", ["imagenet-t2tvit-finetune", "flowers-t2tvit-finetune", "flowers-t2tvit-train"])
def test_fine_tuning_of_nothing(training, monkeypatch, experiment):
    monkeypatch.delenv("CHECKPOINT", raising=False)
    with pytest.raises(UserError, match=r"No checkpoint to fine-tune given. Give train.ckpt=.* or set CHECKPOINT="):
        train(training(experiment=experiment))


def test_a_training_that_was_begun_with_resume(training, tmp_path):
    summary, _ = train(training(train__resume="true"))
    assert (summary.complete, summary.started_from) == (True, {"path": None, "sha256": None})


# Where it is watched


def test_the_best_epoch_is_the_first_of_the_best(training, monkeypatch, tmp_path):
    watch(monkeypatch, 10.0, 30.0, 30.0, 20.0)
    summary, _ = train(training(train__epochs=4))
    assert summary.best == {"epoch": 2, "top1": 30.0}
    best = read_last(tmp_path / "run", "best.ckpt")
    assert (best["global_step"], len(best["training"]["history"])) == (2 * BATCHES, 2)
    assert summary.checkpoints == {
        name: str(tmp_path / "run" / "checkpoints" / f"{name}.ckpt") for name in ("best", "last")
    }


@pytest.mark.parametrize(
    ("ema_decay", "warning"),
    [
        (0.99996, "With train.ema_decay=0.99996, 3 updates leave 100.0 % of the starting weights in the averaged"),
        (0.9, "With train.ema_decay=0.9, 3 updates leave 72.9 % of the starting weights in the averaged weights"),
        (0.3, None),
        ("null", None),
    ],
)
def test_averages_of_few_updates_are_warned_of(training, caplog, ema_decay, warning):
    options = {"train__epochs": 1, "scheduler__warmup_epochs": 0, "train__lr_batch": 512}
    with caplog.at_level("INFO"):
        train(training(train__ema_decay=ema_decay, **options))
    warnings = [record.getMessage() for record in caplog.records if "train.ema_decay" in record.getMessage()]
    assert len(warnings) == (warning is not None)
    if warning is not None:
        assert warnings[0].startswith(warning)
        assert "Give train.ema_decay=" in warnings[0]
    assert "Learning rate 7.81e-05: optimizer.lr=0.01 times 4/512 (train.lr_batch)" in caplog.text


def test_the_warning_names_a_decay_that_needs_none(caplog):
    for updates in (20, 1000):
        warn_of_short_average(0.99996, updates)
        better = float(re.search(r"Give train.ema_decay=([0-9.]+)", caplog.text)[1])
        caplog.clear()
        warn_of_short_average(better, updates)
        assert not caplog.text


def test_held_out_images(training, tmp_path):
    data = make_images(tmp_path / "data", 30, "train")  # and no other split
    summary, objects = train(training(data=data, datamodule__holdout=0.34, train__epochs=2))
    expected = {"train": "train", "num_train_images": 20, "validation": "train, held out", "num_validation_images": 10}
    assert summary.data == {"dir": str(data), **expected, "num_classes": NUM_CLASSES}
    kept, held = (set(part.paths) for part in (objects.datamodule.train_dataset, objects.datamodule.val_dataset))
    assert (len(kept), len(held), len(kept | held)) == (20, 10, 30)
    assert "val_top1" in summary.history[-1]


def test_epochs_that_are_not_watched(training):
    summary, _ = train(training(train__epochs=3, trainer__check_val_every_n_epoch=2))
    assert [("val_top1" in entry, "val_loss" in entry) for entry in summary.history] == [
        (False, False),
        (True, True),
        (False, False),
    ]
    assert summary.best["epoch"] == 2


# What it leaves


def test_the_summary(training, training_data, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["run.py", "a=b"])
    summary, _ = train(training(model___t2tattn_cfg="local"))
    content = json.loads((tmp_path / "run" / "training.json").read_text())
    assert content == json.loads(json.dumps(summary.__dict__))
    assert (content["model"], content["attention"]) == (TRAINING_VARIANT, "local")
    assert content["data"] == {
        "dir": str(training_data),
        "train": "train",
        "num_train_images": NUM_TRAINING_IMAGES,
        "validation": "val",
        "num_validation_images": NUM_IMAGES,
        "num_classes": NUM_CLASSES,
    }
    assert (content["image_size"], content["precision"], content["seed"]) == (IMAGE_SIZE, "32-true", SEED)
    assert (content["epochs"], content["complete"], content["updates"]) == (3, True, 3 * BATCHES)
    assert (content["images_per_update"], content["learning_rate"], content["ema_decay"]) == (4, 0.01, 0.5)
    assert (content["peak_memory_mib"], content["command"]) == (None, "run.py a=b")
    assert content["device"].startswith("cpu")
    assert content["versions"]["torch"] == torch.__version__
    history = content["history"]
    assert [(entry["epoch"], entry["step"]) for entry in history] == [(1, BATCHES), (2, 2 * BATCHES), (3, 3 * BATCHES)]
    assert content["best"]["top1"] == max(entry["val_top1"] for entry in history)
    assert content["seconds"] == sum(entry["seconds"] for entry in history) > 0
    assert all(entry["images_per_second"] == 4 * BATCHES / entry["seconds"] for entry in history)
    assert content["images_per_second"] == pytest.approx(sum(entry["images_per_second"] for entry in history[1:]) / 2)


def test_a_stop_before_the_first_epoch_is_over(training, tmp_path):
    summary, _ = train(training(train__max_time="00:00:00"))
    assert (summary.complete, summary.updates, summary.history, summary.best) == (False, 1, [], None)
    assert (summary.images_per_second, summary.seconds) == (None, 0)
    assert summary.checkpoints == {"last": str(tmp_path / "run" / "checkpoints" / "last.ckpt")}
    assert not (tmp_path / "run" / "training.png").exists()


def test_the_csv_logger_has_the_metrics(training, tmp_path):
    summary, _ = train(training(logger="csv", trainer__log_every_n_steps=1))
    with open(tmp_path / "run" / "csv" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for ours, name in (("train/loss", "train_loss"), ("val/top1", "val_top1"), ("val/loss", "val_loss")):
        logged = [float(row[ours]) for row in rows if row[ours]]
        assert logged == pytest.approx([entry[name] for entry in summary.history], rel=1e-6)
    assert len([row for row in rows if row["train/loss_step"]]) == 3 * BATCHES


def test_the_progress_bar_shows_rate_and_loss(training, watched, terminal, caplog):
    with caplog.at_level(logging.INFO):
        train(training(callbacks__progress_bar=None, train__epochs=2))
    shown = terminal()
    assert "Epoch 2 of 2 ━" in shown
    assert "Epoch 2 of 2: loss" in caplog.text
    assert "v_num" not in shown
    assert re.search(r"\d images/s, loss \d\.\d{3}", shown)


def test_epochs_are_logged_where_there_is_no_terminal(training, watched, caplog):
    config = training(callbacks__progress_bar=None, train__epochs=2)
    config.callbacks.progress_bar.log_seconds = 0
    with caplog.at_level(logging.INFO):
        train(config)
    lines = [line for line in caplog.messages if ": batch " in line]
    assert len(lines) == 2 * BATCHES
    left = r", \S+ images/s, loss \d\.\d{3}, 0:\d\d:\d\d left"
    assert re.fullmatch("Epoch 1 of 2: batch 2 of 3" + left, lines[1])
    assert re.fullmatch("Epoch 2 of 2: batch 2 of 3" + left, lines[BATCHES + 1])


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"+trainer__limit_train_batches": 1}, "A training covers all images. Leave out trainer.limit_train_batches"),
        ({"+trainer__limit_train_batches": 0.5}, "A training covers all images"),
        ({"+trainer__limit_val_batches": 1}, "A training covers all images"),
        ({"+trainer__overfit_batches": 1}, "A training covers all images"),
        ({"+trainer__fast_dev_run": "true"}, "A training covers all images"),
        ({"trainer__max_epochs": 2}, "The length of a training is train.epochs"),
        ({"+trainer__max_steps": 2}, "The length of a training is train.epochs"),
        ({"+trainer__max_time": "00:00:00:01"}, "The time limit of a training is train.max_time=HH:MM:SS"),
        (
            {"callbacks": "none", "callbacks__progress_bar": None},
            "without callbacks.last saves nothing. Leave callbacks=train",
        ),
        ({"scheduler__warmup_epochs": 3}, "train.epochs=3 leaves no epoch between scheduler.warmup_epochs=3 and"),
        ({"scheduler__cooldown_epochs": 2}, "leaves no epoch between .* scheduler.cooldown_epochs=2. Lower these"),
        ({"scheduler__warmup_epochs": "a"}, "scheduler.warmup_epochs=a is not valid"),
        ({"scheduler__min_lr": -1}, "scheduler.min_lr=-1 is not valid"),
        ({"scheduler__sched": "cosinus"}, "scheduler cannot be built: .*cosinus"),
        ({"scheduler__sched": "none"}, "scheduler cannot be built: timm knows no sched=none"),
        ({"scheduler__sched": "plateau"}, "scheduler.sched=plateau needs a metric, which it is not given"),
        ({"+scheduler__cycle_limit": 2}, "scheduler.sched=cosine does not end with train.epochs=3, but with 6"),
        ({"+scheduler__foo": 1}, "scheduler cannot be built: .*'foo'. Check the options under 'scheduler'"),
        ({"optimizer__opt": "adamm"}, "optimizer cannot be built: .*adamm.* Check the options under 'optimizer'"),
        ({"+optimizer__foo": 1}, "optimizer cannot be built: .*'foo'"),
        ({"optimizer__lr": 0}, "optimizer.lr=0 is not valid. Give a learning rate above 0"),
        ({"optimizer__lr": "inf"}, "optimizer.lr=inf is not valid. Give a finite number"),
        ({"optimizer__lr": "nan"}, "optimizer.lr=nan is not valid"),
        ({"optimizer__weight_decay": "inf"}, "optimizer.weight_decay=inf is not valid"),
        ({"scheduler__warmup_lr": "inf"}, "scheduler.warmup_lr=inf is not valid"),
        ({"trainer__gradient_clip_val": "nan"}, "trainer.gradient_clip_val=nan is not valid"),
        ({"trainer__gradient_clip_val": -1}, "trainer.gradient_clip_val=-1 is not valid"),
        ({"optimizer__weight_decay": "a"}, "optimizer.weight_decay=a is not valid"),
        ({"train__epochs": 0}, "train.epochs=0 is not valid"),
        ({"train__lr_batch": 0}, "train.lr_batch=0 is not valid"),
        ({"train__ema_decay": 1}, "train.ema_decay=1 is not valid"),
        ({"train__max_time": "1h"}, "train.max_time=1h is not valid. Give hours, minutes and seconds"),
        ({"train__compile": "maybe"}, "train.compile='maybe' is not valid"),
        ({"train__new_head": "true"}, "leaves out the classifier of train.ckpt, which is not given"),
        ({"train__ckpt": "missing.pth"}, "Checkpoint .*missing.pth does not exist"),
        ({"train__redraw_steps": 0}, "train.redraw_steps=0 is not valid"),
        (
            {"train__redraw_steps": 2, "model___t2tattn_cfg": "local"},
            "has no random features. Leave it out, or choose .*sblocal",
        ),
        ({"trainer__accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches=0 is not valid"),
        ({"trainer__check_val_every_n_epoch": "null"}, "trainer.check_val_every_n_epoch=None is not valid"),
        ({"trainer__log_every_n_steps": 0}, "trainer.log_every_n_steps=0 is not valid"),
        ({"callbacks__last__minutes_between": 0}, "callbacks.last.minutes_between=0 is not valid"),
        ({"datamodule__batch_size": 16}, "14 training images do not fill a batch of 16"),
        ({"seed": -1}, "seed=-1 is not valid"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_mistake_is_one_error(training, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        train(training(**changes))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").iterdir())


def test_a_loss_that_is_no_number(training, monkeypatch, tmp_path):
    step = ClassificationTraining.training_step
    monkeypatch.setattr(
        ClassificationTraining,
        "training_step",
        lambda self, batch, batch_idx: step(self, batch, batch_idx) * (float("nan") if self.global_step == 4 else 1),
    )
    with pytest.raises(UserError, match=r"The loss became nan at update 6. Lower optimizer.lr, .*gradient_clip_val=1"):
        train(training())
    assert read_last(tmp_path / "run")["global_step"] == BATCHES
    assert not (tmp_path / "run" / "training.json").exists()


@pytest.mark.parametrize("ema_decay", ["null", 0.5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(training, monkeypatch, tmp_path, value, ema_decay):
    end = ClassificationTraining.on_train_epoch_end

    def on_train_epoch_end(self):
        end(self)  # after the validation, so that nothing else sees it
        if self.current_epoch == 1:
            self.model.blocks[0].mlp.fc1.weight.data[0, 0] = value

    monkeypatch.setattr(ClassificationTraining, "on_train_epoch_end", on_train_epoch_end)
    message = rf"The weights became NaN or infinite \('model.blocks.0.mlp.fc1.weight'\) at update {2 * BATCHES}. Lower"
    with pytest.raises(UserError, match=message):
        train(training(train__ema_decay=ema_decay))
    assert read_last(tmp_path / "run")["global_step"] == BATCHES
    assert read_last(tmp_path / "run", "best.ckpt")["global_step"] == BATCHES
    assert not (tmp_path / "run" / "training.json").exists()


def test_averaged_weights_that_are_no_numbers(training, monkeypatch, tmp_path):
    end = ClassificationTraining.on_train_epoch_end

    def on_train_epoch_end(self):
        end(self)
        (averaging,) = (each for each in self.trainer.callbacks if isinstance(each, WeightAveraging))
        averaging._average_model.module.model.head.bias.data[0] = float("nan")

    monkeypatch.setattr(ClassificationTraining, "on_train_epoch_end", on_train_epoch_end)
    with pytest.raises(UserError, match=r"The averaged weights became NaN or infinite \('model.head.bias'\) at update"):
        train(training())
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_a_validation_loss_that_is_no_number(training, monkeypatch, tmp_path):
    end = ClassificationTraining.on_train_batch_end

    def on_train_batch_end(self, *arguments):
        end(self, *arguments)
        if self.trainer.is_last_batch:
            self.model.head.bias.data[0] = float("nan")

    monkeypatch.setattr(ClassificationTraining, "on_train_batch_end", on_train_batch_end)
    with pytest.raises(UserError, match=rf"The validation loss became nan at update {BATCHES}. Lower optimizer.lr"):
        train(training(train__ema_decay="null"))
    assert not (tmp_path / "run" / "training.json").exists()


def test_lack_of_memory_names_the_batch_size(training, monkeypatch):
    def forward(self, images):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("src.models.t2t_vit.T2TViT.forward", forward)
    with pytest.raises(UserError, match=r"Lower datamodule.batch_size \(now 4\)"):
        train(training())


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_image(training, tmp_path, split):
    data = make_images(make_images(tmp_path / "data", NUM_TRAINING_IMAGES, "train"), NUM_IMAGES)
    (data / split / "c2" / "002.png").write_text("no image")
    with pytest.raises(UserError, match=f"Cannot decode the image .*{split}/c2/002.png.*Remove or replace"):
        train(training(data=data))


# Several processes


def test_two_processes(training_data, evaluation_of, tmp_path, monkeypatch):
    """At once, and stopped and resumed: the processes do one after the other, since their start takes seconds."""
    options = {"trainer__devices": 2, "datamodule__batch_size": 2, "model___t2tattn_cfg": "sblocal"}
    stop = {"train__max_time": "00:00:00"}
    runs = [("at_once", {}), ("stopped", stop), ("stopped", {"train__resume": "true"})]
    configs = [
        compose_config(training_overrides(training_data, **options, **changes), tmp_path / folder)
        for folder, changes in runs
    ]
    contents = [OmegaConf.to_container(config, resolve=True) for config in configs]
    at_once, stopped, resumed = run_processes(train_in_turn, 2, contents, tmp_path)
    assert at_once.device.startswith("2 x cpu")
    assert (at_once.updates, at_once.images_per_update) == (3 * (NUM_TRAINING_IMAGES // 4), 4)
    for entry in at_once.history:
        assert entry["images_per_second"] == pytest.approx(4 * BATCHES / entry["seconds"])
    assert (stopped.complete, stopped.updates) == (False, 1)
    assert_same_training(*(read_last(tmp_path / folder) for folder in ("at_once", "stopped")))
    assert without_times(resumed.history) == without_times(at_once.history)
    left = [[torch.load(tmp_path / f"{run}_{rank}.pt") for rank in (0, 1)] for run in range(3)]
    for first, second in left:
        assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())
        assert first["losses"] != second["losses"]  # of images of their own
    losses = np.mean([process["losses"] for process in left[0]], axis=0).reshape(3, BATCHES).mean(1)
    assert [entry["train_loss"] for entry in at_once.history] == pytest.approx(losses, rel=1e-6)  # float32

    make_tiny(monkeypatch)
    results, _ = evaluate(evaluation_of(tmp_path / "at_once", model___t2tattn_cfg="sblocal"))
    last = at_once.history[-1]
    assert results.top1 == pytest.approx(last["val_top1"], rel=1e-6)
    assert results.loss == pytest.approx(last["val_loss"], rel=1e-6)


def images_of_training(
    config: DictConfig, patch: pytest.MonkeyPatch, rank: int, world_size: int
) -> list[tuple[str, int]]:
    """Names and classes of the images that a rank of a training is given in its first epoch, in order."""
    decode = ImageDataset.decode
    decoded = []

    def decode_and_record(self, index):
        decoded.append((self.paths[index], self.targets[index]))
        return decode(self, index)

    datamodule = build(config.datamodule, "datamodule")
    datamodule.setup("fit")
    datamodule.trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, global_step=0, accumulate_grad_batches=1, training=True
    )
    with patch.context() as during:
        during.setattr(ImageDataset, "decode", decode_and_record)
        assert len(list(datamodule.train_dataloader())) == 8
    return decoded


def test_processes_share_the_shards_without_repeats(tmp_path, monkeypatch):
    """Three ranks, each with an image a step: over three passes, every image comes three times, shard by shard."""
    for split in ("train", "val"):
        format_files.shards(tmp_path / "data", split)
    options = {"trainer__devices": 3, "datamodule__batch_size": 1, "datamodule__passes_per_epoch": 3}
    options |= {"datamodule__shuffle_shards": 1, "train__epochs": 1, "model__num_classes": 1000}
    options |= {"datamodule__augmentation__mixup_prob": 0, "scheduler__warmup_epochs": 0}  # of pairs of images
    config = compose_config(training_overrides(tmp_path / "data", **options), tmp_path / "run")
    parts = [images_of_training(config, monkeypatch, rank, 3) for rank in range(3)]
    steps = [image for step in zip(*parts, strict=True) for image in step]
    assert len(steps) == 3 * 8
    for number in range(3):
        one_pass = steps[8 * number : 8 * number + 8]
        assert len(set(one_pass)) == 8
        shards = [name.split("/")[0] for name, _ in one_pass]
        assert len(set(shards)) == 1 + sum(a != b for a, b in pairwise(shards)) == 3
    assert sorted({target for _, target in steps}) == sorted(format_files.TARGETS.values())


def test_ctrl_c_stops_several_processes_after_an_update(training_data, tmp_path, capfd):
    last = tmp_path / "checkpoints" / "last.ckpt"
    options = {"trainer__devices": 2, "datamodule__batch_size": 2, "datamodule__num_workers": 1}
    arguments = training_overrides(training_data, **options, train__epochs=100_000, train__ema_decay="null")

    ended = threading.Event()

    def interrupt():
        deadline = time.monotonic() + 100
        while not last.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        if not ended.wait(60):  # a second one ends what does not exit by itself
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        train(compose_config(arguments, tmp_path))
    ended.set()
    thread.join()
    content = json.loads((tmp_path / "training.json").read_text())
    assert not content["complete"]
    assert content["updates"] == read_last(tmp_path)["global_step"] > 0
    assert capfd.readouterr().err == ""  # of data workers that are slow to start, for one
