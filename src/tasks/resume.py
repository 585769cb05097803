"""`eval.resume`: what an earlier evaluation left in the output folder, and whether this one may resume it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer

from scatterbrain.errors import UserError
from src.evaluation.results import RESULTS_FILE, Results, read_results
from src.tasks.evaluation_output import list_skipped
from src.tasks.evaluation_runs import DataModule
from src.tasks.option_changes import option_changes
from src.tasks.resume_state import ResumeState, data_digests, resume_folder

logger = logging.getLogger(__name__)

_PER_ATTENTION = ("attention", "attention_options", "random_features", "seeds")


def check_output_folder(config: DictConfig, run_configs: Sequence[DictConfig]) -> None:
    """Refuse a folder that holds an evaluation which is not to be resumed.

    Args:
        config: the configuration of all.
        run_configs: that of each attention.

    Raises:
        UserError: it holds results or an unfinished evaluation without `eval.resume`, or results of other attentions.
    """
    output_dir = Path(config.paths.output_dir)
    folders = [Path(run.paths.output_dir) for run in run_configs]
    if config.eval.resume:
        others = [path.parent for path in (output_dir / RESULTS_FILE, *output_dir.glob(f"[0-9]*/{RESULTS_FILE}"))]
        other = next((folder for folder in others if folder not in folders and (folder / RESULTS_FILE).exists()), None)
        if other is not None:
            raise UserError(
                f"{output_dir} holds an evaluation of other attentions (see {other}), but eval.attentions="
                f"{config.eval.attentions}. Give the same to resume it, or choose another hydra.run.dir."
            )
        return
    found = {folder: read_results(folder) for folder in folders if (folder / RESULTS_FILE).exists()}
    complete = [folder for folder, results in found.items() if results.complete]
    # a killed run may have written the results of some attentions alone
    if len(complete) == len(folders) or (complete and not resume_folder(output_dir).exists()):
        raise UserError(
            f"{complete[0]} holds the results of an earlier run. Choose another hydra.run.dir, or move them away."
        )
    if found or resume_folder(output_dir).exists():
        raise UserError(
            f"{output_dir} holds an unfinished evaluation. eval.resume=true resumes it; or choose another "
            "hydra.run.dir."
        )


def finished_results(config: DictConfig, descriptions: Sequence[Mapping[str, Any]], on_error: str) -> list[Results]:
    """Results of a finished evaluation in the folder, with `eval.resume`; none where there is something to evaluate.

    Args:
        config: see `evaluate.with_runs`.
        descriptions: of each attention alone, see `describe_evaluation`.
        on_error: of the data module.

    Raises:
        UserError: results are there of another evaluation, or of one that skipped images which are errors now.
    """
    if not config.eval.resume:
        return []
    finished = []
    for run, description in zip(config.runs, descriptions, strict=True):
        folder = Path(run.paths.output_dir)
        results = read_results(folder) if (folder / RESULTS_FILE).exists() else None
        if results is None or not results.complete:
            continue
        different = changed_settings(results, description)
        if different:
            raise UserError(
                f"{folder} holds a finished evaluation with {', '.join(different)}. Give the same to resume it, or "
                "choose another hydra.run.dir."
            )
        if results.skipped is not None and results.skipped["number"] and on_error == "raise":
            _refuse_skipped(folder, "a finished", results.skipped["images"])
        finished.append(results)
    return finished if len(finished) == len(config.runs) else []


def resume_hint(config: DictConfig) -> str:
    """How to resume this evaluation, a sentence; it depends on Hydra, which spawned processes do not have."""
    option = f"hydra.run.dir={config.paths.output_dir}"
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        option = f"hydra.sweep.dir={Path(HydraConfig.get().sweep.dir).absolute()}"
    return f"The same command with eval.resume=true {option} resumes it."


def open_resume_state(
    config: DictConfig,
    trainer: Trainer,
    datamodule: DataModule,
    description: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> ResumeState:
    """The resume state in the output folder; the data module then leaves out the batches it holds.

    Args:
        config: the configuration of all.
        trainer: of all.
        datamodule: its test loader is replaced where there is something to resume.
        description: see `describe_evaluation`.
        environment: what may change the results in their last digits.

    Raises:
        UserError: it is of another evaluation, or of one that skipped images which are errors now.
    """
    dataset = datamodule.test_dataset
    state = ResumeState(
        config.paths.output_dir,
        # the batches of each rank
        {**description, "trainer.devices": trainer.world_size},
        environment,
        rank=trainer.global_rank,
        save_seconds=config.eval.save_seconds,
    )
    if state.skipped and datamodule.on_error == "raise":
        skipped = {dataset.paths[index]: reason for index, reason in state.skipped.items()}
        _refuse_skipped(config.paths.output_dir, "an unfinished", skipped)
    if state.num_saved:
        logger.info("Resuming the evaluation in %s.", config.paths.output_dir)
        load_all = datamodule.test_dataloader
        datamodule.test_dataloader = lambda: state.remaining_batches(load_all())
    return state


def _refuse_skipped(folder: str | Path, which: str, skipped: Mapping[str | Path, str]) -> NoReturn:
    raise UserError(
        f"{folder} holds {which} evaluation that left out {len(skipped)} images, which could not be decoded: "
        f"{list_skipped(skipped)}. Give datamodule.on_error=skip to resume it, or choose another hydra.run.dir."
    )


def compared_settings(config: DictConfig, datamodule: DataModule) -> dict[str, Any]:
    """What has to be the same to resume and is no other field of `Results`."""
    dataset = datamodule.test_dataset
    loading = ("batch_size", "interpolation", "crop_pct", "mean", "std", "num_distinct")
    options = {name: config.datamodule[name] for name in loading if name in config.datamodule}
    return {
        **{f"data.{name}": digest for name, digest in data_digests(dataset).items()},
        "eval.compile": config.eval.compile,
        "datamodule": OmegaConf.to_container(OmegaConf.create(options), resolve=True),
    }


def changed_settings(results: Results, description: Mapping[str, Any]) -> list[str]:
    """What differs between results and an evaluation, as `"name=old (now new)"`, as far as the results' file has it.

    Args:
        results: of an attention alone.
        description: of the evaluation, see `describe_evaluation`.
    """
    earlier = _description_of(results)
    now = json.loads(json.dumps(description))  # as the file returns it
    return option_changes(earlier, {name: now.get(name) for name in earlier})


def _description_of(results: Results) -> dict[str, Any]:
    """What `describe_evaluation` gave for these results, as far as their file has it."""
    skipped = 0 if results.skipped is None else results.skipped["number"]
    data = {**results.data, "num_images": results.data["num_images"] + skipped}
    compared = {} if results.compared is None else results.compared
    return _common_description({**dataclasses.asdict(results), "data": data}, results.fast, compared) | {
        name: getattr(results, name) for name in _PER_ATTENTION
    }


def describe_evaluation(
    metadata: Sequence[Mapping[str, Any]], fast: bool, compared: Mapping[str, Any]
) -> dict[str, Any]:
    """What has to be the same to resume: everything that results depend on.

    Args:
        metadata: of the results of each attention.
        fast: whether the inference models are evaluated.
        compared: see `compared_settings`.
    """
    per_attention: dict[str, Any] = {name: [each[name] for each in metadata] for name in _PER_ATTENTION}
    if len(metadata) == 1:
        per_attention = {name: values[0] for name, values in per_attention.items()}
    return per_attention | _common_description(metadata[0], fast, compared)


def _common_description(metadata: Mapping[str, Any], fast: bool, compared: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": metadata["model"],
        "checkpoint.sha256": metadata["checkpoint"]["sha256"],
        "data.split": metadata["data"]["split"],
        "data.num_images": metadata["data"]["num_images"],
        "model.num_classes": metadata["data"]["num_classes"],
        **{name: metadata[name] for name in ("image_size", "precision")},
        "model.fast": fast,
        **compared,
    }
