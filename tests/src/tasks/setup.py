"""A small evaluation and a small training: generated images, weights from names, and the command line of both."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from src.checkpoints.seeded_weights import published_shapes, seeded_weights
from src.tasks.classification_evaluation import SeededClassifier
from src.tasks.classification_training import ClassificationTraining

CONFIG_DIR = str(Path(__file__).parents[3] / "configs")
EXPERIMENT = "imagenet-t2tvit-eval"
TRAINING_EXPERIMENT = "imagenet-t2tvit-train"
TRAINING_VARIANT = "t2t_vit_t_7"
# of trainings on sequences
SEQUENCE_EXPERIMENTS = sorted(
    path.stem
    for path in Path(CONFIG_DIR, "experiment").glob("*.yaml")
    if "override /mode: sequence" in path.read_text(encoding="utf-8")
)
NUM_CLASSES = 5
IMAGE_SIZE = 32


def make_images(folder: Path, number: int, split: str = "val") -> Path:
    """`folder`/`split`/c0 ... c4 with `number` images of random pixels, no two of the same size."""
    generator = np.random.default_rng(0)
    for index in range(number):
        path = folder / split / f"c{index % NUM_CLASSES}" / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 40 + index, 3), dtype=np.uint8)).save(path)
    return folder


def make_checkpoint(path: Path, variant: str, num_classes: int = NUM_CLASSES) -> Path:
    """A checkpoint in the published form."""
    weights = seeded_weights(published_shapes(variant, num_classes, IMAGE_SIZE))
    torch.save({"state_dict_ema": {key: weight.float() for key, weight in weights.items()}}, path)
    return path


def overrides(data: Path, checkpoint: Path, variant: str, **changes: object) -> list[str]:
    """Command line of an evaluation; `changes` as in `_arguments`."""
    return _arguments(
        {
            "experiment": EXPERIMENT,
            "model/t2tmodel": variant,
            **_common_options(data),
            "eval.ckpt": checkpoint,
            "callbacks": "none",
        },
        changes,
    )


def training_overrides(data: Path, **changes: object) -> list[str]:
    """Command line of a training of three epochs that moves the weights well; `changes` as in `_arguments`."""
    return _arguments(
        {
            "experiment": TRAINING_EXPERIMENT,
            "model/t2tmodel": TRAINING_VARIANT,
            **_common_options(data),
            "train.epochs": 3,
            "train.lr_batch": "null",
            "train.ema_decay": 0.5,
            "optimizer.lr": 0.01,
            "scheduler.warmup_epochs": 1,
            "scheduler.cooldown_epochs": 0,
            "callbacks.progress_bar": "null",
            "logger": "none",
        },
        changes,
    )


def _common_options(data: Path) -> dict[str, object]:
    return {
        "model.image_size": IMAGE_SIZE,
        "model.num_classes": NUM_CLASSES,
        "datamodule.data_dir": data,
        "datamodule.batch_size": 4,
        "datamodule.num_workers": 0,
        "trainer.accelerator": "cpu",
    }


def _arguments(options: dict[str, object], changes: dict[str, object]) -> list[str]:
    """Options of a command line, changed: `.` is written as `__` and `/` as `___`, and None leaves an option out."""
    options |= {name.replace("___", "/").replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in options.items() if value is not None]


def compose_config(arguments: list[str], output_dir: Path | None = None) -> DictConfig:
    """The configuration of a command line, as a run sees it."""
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        config = compose("config", arguments)
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        config.paths.output_dir = str(output_dir)
    return config


def stop_at(patch: pytest.MonkeyPatch, update: int, number: int = signal.SIGTERM) -> None:
    """Let the process get the signal `number` during an update, in the first of its batches."""
    step = ClassificationTraining.training_step
    sent = []

    def training_step(self, batch, batch_idx):
        if self.global_step == update - 1 and not sent:
            sent.append(update)
            signal.raise_signal(number)
        return step(self, batch, batch_idx)

    patch.setattr(ClassificationTraining, "training_step", training_step)


def stop_evaluation_at(patch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Let the process get the signal `number` while it evaluates a batch, the first step of all being number 1."""
    evaluate_batch = SeededClassifier.step
    steps = []

    def evaluate_and_signal(self, *batch):
        steps.append(batch)
        if len(steps) == step:
            signal.raise_signal(number)
        evaluate_batch(self, *batch)

    patch.setattr(SeededClassifier, "step", evaluate_and_signal)


def assert_same_evaluation(ours: Path, theirs: Path) -> None:
    """Fail unless two folders hold the same evaluation, bit for bit, but for times and the command."""
    assert (ours / "predictions.csv").read_bytes() == (theirs / "predictions.csv").read_bytes()
    texts = [
        [
            line
            for line in (folder / "results.json").read_text().splitlines()
            if not line.lstrip().startswith(('"images_per_second"', '"seconds"', '"command"'))
        ]
        for folder in (ours, theirs)
    ]
    assert texts[0] == texts[1]


def watch(patch: pytest.MonkeyPatch, *top1: float) -> None:
    """Let the epochs have these accuracies, in percent."""

    def on_validation_epoch_end(self):
        self.log_dict({"val/top1": top1[self.current_epoch], "val/top5": 100.0, "val/loss": 1.0})

    patch.setattr(ClassificationTraining, "on_validation_epoch_end", on_validation_epoch_end)


def read_last(folder: Path, name: str = "last.ckpt") -> dict[str, Any]:
    """A checkpoint of the training in `folder`."""
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def without_times(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """A history without what differs between two runs of the same training."""
    return [{name: x for name, x in entry.items() if name not in ("seconds", "images_per_second")} for entry in history]


def assert_same_training(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Fail unless two checkpoints hold the same weights, optimizer, schedule and figures, bit for bit."""
    states = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")
    for name in ("epoch", "global_step", *states):
        _assert_same(ours[name], theirs[name], name)
    assert without_times(ours["training"]["history"]) == without_times(theirs["training"]["history"])


def _assert_same(ours: Any, theirs: Any, name: str) -> None:
    """Compare nested dicts and lists of tensors and plain values."""
    assert type(ours) is type(theirs), name
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), name
    elif isinstance(ours, list):
        _assert_same(dict(enumerate(ours)), dict(enumerate(theirs)), name)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), name
        for key in ours:
            _assert_same(ours[key], theirs[key], f"{name}.{key}")
    else:
        assert ours == theirs, name
