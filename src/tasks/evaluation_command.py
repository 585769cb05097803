"""The command that evaluates the weights of a training."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from scatterbrain.attention import ATTENTIONS, create_attention
from src.datamodules.image_folder import ImageFolderDataModule
from src.evaluation.training_summary import TrainingSummary
from src.tasks.training_resume import plain_option


def evaluation_command(config: DictConfig, summary: TrainingSummary) -> str:
    """Command line that evaluates the last checkpoint of a training."""
    options = {
        "experiment": "imagenet-t2tvit-eval",
        "model/t2tmodel": summary.model,
        **_attention_options(config.model, summary.attention),
        "model.num_classes": summary.data["num_classes"],
        "model.image_size": summary.image_size,
        "datamodule.data_dir": summary.data["dir"],
        "eval.ckpt": summary.checkpoints["last"],
    }
    defaults = inspect.signature(ImageFolderDataModule).parameters
    for name in ("test_split", "class_order", "labels", "interpolation", "crop_pct", "mean", "std"):
        value = plain_option(config.datamodule, name)
        default = defaults[name].default
        if value != (list(default) if isinstance(default, tuple) else default):
            options[f"datamodule.{name}"] = value
    arguments = [f"{name}={_quoted(value)}" for name, value in options.items() if value is not None]
    return shlex.join(["python", "run.py", *arguments])


def _attention_options(model: DictConfig, attention: str | None) -> dict[str, Any]:
    """Options that choose the attention of both token stages, as short as they can be."""
    if attention is None:
        return {}
    first, second = attention.split("+") if "+" in attention else (attention, attention)
    options = {"model/t2tattn_cfg": first}
    if second != first:
        options["model.t2tattn2_cfg.name"] = second
    stages = [plain_option(model, f"t2tattn{stage}_cfg") or {} for stage in (1, 2)]
    if any(_is_changed(name, value, stage) for stage in stages for name, value in stage.items()):
        for number, stage in enumerate(stages, start=1):
            options |= {
                f"++model.t2tattn{number}_cfg.{name}": value
                for name, value in stage.items()
                if name != "name" and value is not None
            }
    return options


def _is_changed(name: str, value: Any, stage: Mapping[str, Any]) -> bool:
    """Whether an option of a stage's attention differs from its default."""
    defaults = {
        **inspect.signature(create_attention).parameters,
        **inspect.signature(ATTENTIONS[stage["name"]].module).parameters,
    }
    return name != "name" and value is not None and (name not in defaults or value != defaults[name].default)


def _quoted(value: Any) -> str:
    """A value, quoted for Hydra."""
    if not isinstance(value, str) or re.fullmatch(r"[A-Za-z0-9_./:-]+", value):
        return str(value)
    return "'" + value.replace("'", r"\'") + "'"
