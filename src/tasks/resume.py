"""`eval.resume`: what an earlier evaluation left in the output folder, and whether this one may resume it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer

from scatterbrain.errors import UserError
from src.evaluation.results import RESULTS_FILE, Results, read_results
from src.tasks.evaluation_output import list_skipped
from src.tasks.evaluation_runs import DataModule
from src.tasks.resume_state import ResumeState, names_digest, resume_folder

logger = logging.getLogger(__name__)


def finished_results(config: DictConfig, run_configs: Sequence[DictConfig]) -> list[Results]:
    """Results of a finished evaluation in the folder, with `eval.resume`; none where there is something to evaluate.

    Args:
        config: the configuration of all.
        run_configs: that of each attention.

    Raises:
        UserError: the folder holds an evaluation that is not to be resumed, or cannot be.
    """
    output_dir = Path(config.paths.output_dir)
    folders = [Path(run.paths.output_dir) for run in run_configs]
    found = {folder: read_results(folder) for folder in folders if (folder / RESULTS_FILE).exists()}
    complete = [folder for folder, results in found.items() if results.complete]
    can_resume = resume_folder(output_dir).exists()
    if config.eval.resume and len(complete) == len(folders):
        return list(found.values())
    if complete and not (config.eval.resume and can_resume):
        raise UserError(
            f"{complete[0]} holds the results of an earlier run. Choose another hydra.run.dir, or move them away."
        )
    if (can_resume or found) and not config.eval.resume:
        raise UserError(
            f"{output_dir} holds an unfinished evaluation. eval.resume=true resumes it; or choose another "
            "hydra.run.dir."
        )
    return []


def resume_hint(config: DictConfig) -> str:
    """How to resume this evaluation, a sentence; it depends on Hydra, which spawned processes do not have."""
    option = f"hydra.run.dir={config.paths.output_dir}"
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        option = f"hydra.sweep.dir={Path(HydraConfig.get().sweep.dir).absolute()}"
    return f"The same command with eval.resume=true {option} resumes it."


def open_resume_state(
    config: DictConfig, trainer: Trainer, datamodule: DataModule, metadata: Sequence[dict[str, Any]], fast: bool
) -> ResumeState:
    """The resume state in the output folder; the data module then leaves out the batches it holds.

    Args:
        config: the configuration of all.
        trainer: of all.
        datamodule: its test loader is replaced where there is something to resume.
        metadata: of the results of each attention.
        fast: whether the inference models are evaluated.

    Raises:
        UserError: it is of another evaluation, or of one that skipped images which are errors now.
    """
    dataset = datamodule.test_dataset
    state = ResumeState(
        config.paths.output_dir,
        _description(config, trainer, datamodule, metadata, fast),
        environment={name: metadata[0][name] for name in ("device", "versions")},
        rank=trainer.global_rank,
        save_seconds=config.eval.save_seconds,
    )
    if state.skipped and datamodule.on_error == "raise":
        skipped = {dataset.paths[index]: reason for index, reason in state.skipped.items()}
        raise UserError(
            f"{config.paths.output_dir} holds an unfinished evaluation that left out {len(skipped)} images, which "
            f"could not be decoded: {list_skipped(skipped)}. Give datamodule.on_error=skip to resume it, or choose "
            "another hydra.run.dir."
        )
    if state.num_saved:
        logger.info("Resuming the evaluation in %s.", config.paths.output_dir)
        load_all = datamodule.test_dataloader
        datamodule.test_dataloader = lambda: state.remaining_batches(load_all())
    return state


def _description(
    config: DictConfig, trainer: Trainer, datamodule: DataModule, metadata: Sequence[dict[str, Any]], fast: bool
) -> dict[str, Any]:
    """What has to be the same to resume: everything that results depend on."""
    dataset, first = datamodule.test_dataset, metadata[0]
    per_attention: dict[str, Any] = {
        name: [each[name] for each in metadata]
        for name in ("attention", "attention_options", "random_features", "seeds")
    }
    if len(metadata) == 1:
        per_attention = {name: values[0] for name, values in per_attention.items()}
    loading = ("batch_size", "interpolation", "crop_pct", "mean", "std", "num_distinct")
    options = {name: config.datamodule[name] for name in loading if name in config.datamodule}
    return {
        "model": first["model"],
        **per_attention,
        "checkpoint.sha256": first["checkpoint"]["sha256"],
        "data.split": first["data"]["split"],
        "data.num_images": len(dataset),
        "data.names.sha256": names_digest(dataset.paths, dataset.targets),
        "model.num_classes": first["data"]["num_classes"],
        **{name: first[name] for name in ("image_size", "precision")},
        "model.fast": fast,
        "eval.compile": config.eval.compile,
        "trainer.devices": trainer.world_size,
        "datamodule": OmegaConf.to_container(OmegaConf.create(options), resolve=True),
    }
