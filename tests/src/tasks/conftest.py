"""Images and checkpoints of evaluations and trainings, made once."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from omegaconf import DictConfig

import src.evaluation.training_summary as training_module
from src.models.t2t_vit import T2T_VIT_VARIANTS
from src.tasks.train import train
from tests.processes import fresh_context
from tests.src.tasks.setup import (
    TRAINING_VARIANT,
    compose_config,
    make_checkpoint,
    make_images,
    overrides,
    training_overrides,
)

NUM_IMAGES = 11
# three batches of 4, and two that fill none
NUM_TRAINING_IMAGES = 14
VARIANTS = ("t2t_vit_7", "t2t_vit_t_14")


@pytest.fixture(autouse=True)
def fresh_processes(monkeypatch):
    """Processes that start afresh come from a server."""
    monkeypatch.setattr("multiprocessing.get_context", fresh_context)


@pytest.fixture
def terminal(monkeypatch, capsys):
    """`terminal()`: what was shown so far on a terminal of 80 columns, without the codes for colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")

    def shown() -> str:
        output = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capsys.readouterr().out)
        return "\n".join(" ".join(line.split()) for line in re.split(r"[\r\n]", output))

    return shown


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"), NUM_IMAGES)


def make_shallow(patch: pytest.MonkeyPatch) -> None:
    """One backbone block in place of 7 and 14, which changes nothing that an evaluation does but its time."""
    for name in VARIANTS:
        patch.setitem(T2T_VIT_VARIANTS, name, dataclasses.replace(T2T_VIT_VARIANTS[name], depth=1))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Weights of the shallow variants."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        make_shallow(patch)
        return {variant: make_checkpoint(folder / f"{variant}.pth", variant) for variant in VARIANTS}


@pytest.fixture
def shallow(monkeypatch) -> None:
    """The variants that `checkpoints` fit, in this process."""
    make_shallow(monkeypatch)


@pytest.fixture
def evaluation(data, checkpoints, shallow, tmp_path):
    """`evaluation(variant, folder="run", **changes)`: the configuration of an evaluation into `tmp_path`/folder."""

    def build(variant: str = "t2t_vit_7", folder: str = "run", **changes: object) -> DictConfig:
        arguments = overrides(changes.pop("data", data), checkpoints[variant], variant, **changes)
        return compose_config(arguments, tmp_path / folder)

    return build


def make_tiny(patch: pytest.MonkeyPatch) -> None:
    """Two narrow blocks, so that there is stochastic depth, in the variant that is trained."""
    tiny = dataclasses.replace(T2T_VIT_VARIANTS[TRAINING_VARIANT], embed_dim=64, depth=2, num_heads=2)
    patch.setitem(T2T_VIT_VARIANTS, TRAINING_VARIANT, tiny)


@pytest.fixture(scope="session")
def training_data(tmp_path_factory) -> Path:
    folder = make_images(tmp_path_factory.mktemp("training_data"), NUM_IMAGES)
    return make_images(folder, NUM_TRAINING_IMAGES, "train")


@pytest.fixture(scope="session")
def stopped_training(training_data, tmp_path_factory) -> Path:
    """Folder of a training with Scatterbrain that was stopped after its first update."""
    folder = tmp_path_factory.mktemp("stopped_training")
    changes = {"model___t2tattn_cfg": "sblocal", "train__max_time": "00:00:00"}
    with pytest.MonkeyPatch.context() as patch:
        make_tiny(patch)
        train(compose_config(training_overrides(training_data, **changes), folder))
    return folder


@pytest.fixture
def training(training_data, tmp_path, monkeypatch):
    """`training(folder="run", **changes)`: the configuration of a training into `tmp_path`/folder.

    What it draws is an empty figure, since the curves take longer than the training.
    """
    make_tiny(monkeypatch)
    monkeypatch.setattr(training_module, "training_figure", lambda summary: Figure(figsize=(1, 1)))

    def build(folder: str = "run", **changes: object) -> DictConfig:
        return compose_config(training_overrides(changes.pop("data", training_data), **changes), tmp_path / folder)

    return build
