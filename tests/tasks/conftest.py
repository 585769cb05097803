"""Images and checkpoints of the evaluations, made once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from omegaconf import DictConfig

from src.models.t2t_vit import T2T_VIT_VARIANTS
from tests.tasks.setup import compose_config, make_checkpoint, make_images, overrides

NUM_IMAGES = 11
VARIANTS = ("t2t_vit_7", "t2t_vit_t_14")


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
