"""The configuration of each attention of an evaluation: the model's own, or those of `eval.attentions`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from scatterbrain.errors import UserError, did_you_mean
from src.utils.cli import describe_missing_attention_config
from src.utils.instantiate import escape_interpolations

logger = logging.getLogger(__name__)

GROUP_FOLDER = Path(__file__).resolve().parents[2] / "configs" / "model" / "t2tattn_cfg"
STAGES = ("t2tattn1_cfg", "t2tattn2_cfg")


def requested_attentions(config: DictConfig) -> list[str]:
    """The names in `config.eval.attentions`; none where the attention of the model itself is evaluated.

    Raises:
        UserError: no list, a name that is unknown or listed twice, or another choice that contradicts it: a multirun,
            or an attention for the model.
    """
    names = config.eval.get("attentions")
    if names is None:
        return []
    if not isinstance(names, ListConfig):
        raise UserError(f"eval.attentions={names} is not valid. Give a list: eval.attentions=[full,sblocal].")
    names = list(names)
    known = sorted(path.stem for path in GROUP_FOLDER.glob("*.yaml"))
    for number, name in enumerate(names):
        if name not in known:
            message = f"There is no attention '{name}' (eval.attentions). {did_you_mean(name, known)}"
            raise UserError(describe_missing_attention_config(name) or message)
        if name in names[:number]:
            raise UserError(f"eval.attentions lists '{name}' twice. Give each attention once.")
    if not names:
        return []
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise UserError(
            "eval.attentions evaluates all its attentions in one run. Leave out -m, or sweep over "
            f"model/t2tattn_cfg={','.join(names)} in its place."
        )
    if any(isinstance(stage, DictConfig) and "name" in stage for stage in map(config.model.get, STAGES)):
        raise UserError(
            "The model's attention is chosen twice, by eval.attentions and by model/t2tattn_cfg (or "
            "model.t2tattn1_cfg.name, model.t2tattn2_cfg.name). Leave one of them out."
        )
    return names


def attention_configs(config: DictConfig, names: Sequence[str]) -> list[DictConfig]:
    """The configuration of each attention, as if it had been chosen by `model/t2tattn_cfg` in a run of its own.

    Options of the token stages, such as `model.t2tattn1_cfg.memory_fraction=0.0625`, go to every attention that has
    them.

    Args:
        config: the composed configuration of all; its stages hold nothing but such options.
        names: choices of the group `model/t2tattn_cfg`, see `requested_attentions`.

    Returns:
        One configuration for each name; the folder of number i is the subfolder i of `config.paths.output_dir`, as
        in a multirun.

    Raises:
        UserError: an option that none of the attentions has.
    """
    groups = [OmegaConf.load(GROUP_FOLDER / f"{name}.yaml") for name in names]
    for stage in STAGES:
        for option, value in _options(config, stage).items():
            holders = [name for name, group in zip(names, groups, strict=True) if option in group[stage]]
            if not holders:
                known = {key for group in groups for key in group[stage]} - {"name"}
                raise UserError(
                    f"None of eval.attentions={','.join(names)} has the option 'model.{stage}.{option}'. "
                    f"{did_you_mean(option, known)}"
                )
            if len(holders) < len(names):
                logger.info("model.%s.%s=%s applies to %s alone.", stage, option, value, ", ".join(holders))
    configs = []
    for number, group in enumerate(groups):
        own = copy.deepcopy(config)
        OmegaConf.set_struct(own, False)
        for stage in STAGES:
            options = {key: value for key, value in _options(config, stage).items() if key in group[stage]}
            own.model[stage] = OmegaConf.merge(group[stage], options)
        own.eval.attentions = None
        own.paths.output_dir = escape_interpolations(str(Path(config.paths.output_dir) / str(number)))
        configs.append(own)
    return configs


def _options(config: DictConfig, stage: str) -> dict[str, Any]:
    """Options of a token stage that were given apart from its attention, interpolations left as they are."""
    options = config.model.get(stage)
    return {} if options is None else OmegaConf.to_container(options, resolve=False)
