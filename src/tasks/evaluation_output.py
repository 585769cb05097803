"""Results of an evaluation: from the records of the test to files, loggers, tables and messages."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer
from rich.console import Console

from scatterbrain.errors import UserError
from src.distributed.loggers import log_results
from src.evaluation.comparison import OnePass, compare_runs
from src.evaluation.comparison_files import is_written, print_comparison, write_comparison
from src.evaluation.predictions import write_predictions
from src.evaluation.records import summarise
from src.evaluation.results import ACCURACY, RESULTS_FILE, Results, skipped_info, write_results
from src.evaluation.results_table import results_table
from src.tasks.attention_info import attention_cost
from src.tasks.classification_evaluation import ClassificationEvaluation
from src.tasks.environment import peak_memory_mib
from src.tasks.errors import prefix_errors
from src.tasks.evaluation_runs import DataModule, EvaluationRun
from src.utils.labels import NO_LABEL
from src.utils.text import abbreviate

logger = logging.getLogger(__name__)


def collect_results(
    runs: Sequence[EvaluationRun],
    task: ClassificationEvaluation,
    datamodule: DataModule,
    fast: bool,
    peak_memory: float | None,
    compared: Mapping[str, Any],
    one_pass: OnePass | None,
    device: torch.device,
) -> list[Results] | None:
    """Results of each run after the test; None where no image was evaluated.

    Args:
        runs: in the order of the classifiers of `task`.
        task: after the test.
        datamodule: of the test.
        fast: whether the inference models were evaluated.
        peak_memory: of the device, MiB; None on the CPU, and where the pass had several attentions.
        compared: see `Results`.
        one_pass: of `eval.attentions`.
        device: of the test, for the memory of the attention; not measured after an interruption.
    """
    if None in task.records:
        return None
    skipped = None
    num_images = task.num_images
    if datamodule.on_error != "raise":
        skipped = skipped_info(skipped_images(task, datamodule))
        num_images -= len(task.skipped)
    return [
        Results(
            **{**run.metadata, "data": {**run.metadata["data"], "num_images": num_images}},
            images_per_second=task.images_per_second[number],
            peak_memory_mib=peak_memory,
            seconds=task.seconds_of[number],
            fast=fast,
            complete=not task.stopped,
            num_evaluated=len(task.evaluated),
            skipped=skipped,
            compared=dict(compared),
            one_pass=None if one_pass is None else dataclasses.asdict(one_pass),
            **summarise(task.records[number]),
            **({} if task.stopped else attention_cost(run.classifier.model, device)),
        )
        for number, run in enumerate(runs)
    ]


def write_runs(
    config: DictConfig,
    runs: Sequence[EvaluationRun],
    results: Sequence[Results],
    task: ClassificationEvaluation,
    datamodule: DataModule,
) -> None:
    """Write and log the results of each run, and with `eval.attentions` compare them, as a multirun does.

    Of a part of the images, there is neither a comparison nor anything for the loggers.

    Raises:
        UserError: results are not finite or cannot be written, or a logger fails; all other results are written and
            compared before.
    """
    paths = [datamodule.test_dataset.paths[index] for index in task.evaluated]
    written: list[Path] = []
    errors: list[UserError] = []
    for run, result, records in zip(runs, results, task.records, strict=True):
        try:
            with prefix_errors(run.classifier.name):
                if config.compare:  # otherwise the folder is that of Hydra
                    (run.output_dir / ".hydra").mkdir(parents=True, exist_ok=True)
                    OmegaConf.save(run.config, run.output_dir / ".hydra" / "config.yaml")
                write_predictions(run.output_dir, paths, records)
                write_results(run.output_dir, result)
                written.append(run.output_dir)
                # last: a logger that fails must not cost the results
                if not task.stopped and result.top1 is not None:
                    log_results(run.loggers, {f"test/{name}": getattr(result, name) for name in ACCURACY})
        except UserError as error:
            errors.append(error)
    if config.compare and written and not task.stopped:
        _compare(config, written, [run.output_dir for run in runs if run.output_dir not in written], results[0])
    if errors:
        raise UserError(" ".join(map(str, errors)))
    if not config.compare:
        Console().print(results_table(results[0], results[0].published))
        logger.info("Results: %s", runs[0].output_dir / RESULTS_FILE)


def one_pass_of(runs: Sequence[EvaluationRun], task: ClassificationEvaluation, trainer: Trainer) -> OnePass:
    """Duration and memory of the pass, after the test."""
    return OnePass(
        attentions=len(runs),
        forward_passes=num_forward_passes(runs),
        seconds=task.seconds,
        peak_memory_mib=peak_memory_mib(trainer),
    )


def complete_comparison(config: DictConfig, results: Sequence[Results]) -> None:
    """Compare finished runs whose process was killed before it had written the comparison.

    Args:
        config: see `evaluate.with_runs`.
        results: of every run.
    """
    if config.compare:
        _compare(config, [Path(run.paths.output_dir) for run in config.runs], [], results[0])


def _compare(config: DictConfig, written: Sequence[Path], failed: Sequence[Path], first: Results) -> None:
    """Compare runs, and write and log it unless that is done."""
    one_pass = None if first.one_pass is None else OnePass(**first.one_pass)
    comparison = compare_runs(written, failed, one_pass)
    if is_written(config.paths.output_dir, comparison):
        return
    print_comparison(comparison, write_comparison(config.paths.output_dir, comparison))
    if one_pass is not None:
        logger.info("Done: %s.", one_pass.describe(first.data["num_images"]))


def num_forward_passes(runs: Sequence[EvaluationRun]) -> int:
    """Forward passes of each image, over all attentions and seeds."""
    return sum(len(run.classifier.seeds) for run in runs)


def log_start(config: DictConfig, runs: Sequence[EvaluationRun], datamodule: DataModule) -> None:
    """Log what is about to be evaluated, that there are no labels, and where random features are the checkpoint's."""
    dataset = datamodule.test_dataset
    if config.compare:
        logger.info(
            "Evaluating %s with %d attention(s), %s: %d forward passes of each of %d images of %s",
            *(config.model.name, len(runs), ", ".join(run.classifier.name for run in runs)),
            *(num_forward_passes(runs), len(dataset), dataset.root),
        )
    else:
        attention = runs[0].metadata["attention"] or "of its own"
        logger.info(
            "Evaluating %s with attention %s on %d images of %s",
            *(config.model.name, attention, len(dataset), dataset.root),
        )
    if int(dataset.targets[0]) == NO_LABEL:
        logger.info("The images have no labels (datamodule.labels=none): accuracy and loss are left out.")
    for run in runs:
        if run.metadata["random_features"] == "checkpoint":
            prefix = "" if run.classifier.name is None else f"{run.classifier.name}: "
            logger.info("%sRandom features: those of the checkpoint; eval.redraw=true draws others", prefix)


def log_skipped(task: ClassificationEvaluation, datamodule: DataModule) -> None:
    """Warn of images that were skipped."""
    if task.skipped:
        logger.warning(
            "%s of %s images of %s cannot be decoded and were left out (datamodule.on_error=skip), see %s: %s",
            *(f"{len(task.skipped):,}", f"{task.num_images:,}", datamodule.test_dataset.root, RESULTS_FILE),
            list_skipped(skipped_images(task, datamodule)),
        )


def log_stop(task: ClassificationEvaluation, resume_hint: str) -> None:
    """Warn of a stop before the end, and say how to resume."""
    if task.stopped:
        logger.warning(
            "The evaluation stopped after %s of %s images on request. %s",
            *(f"{len(task.evaluated):,}", f"{task.num_images:,}", resume_hint),
        )


def skipped_images(task: ClassificationEvaluation, datamodule: DataModule) -> dict[str | Path, str]:
    """Names of the images that could not be decoded, and why."""
    paths = datamodule.test_dataset.paths
    return {paths[index]: reason for index, reason in sorted(task.skipped.items())}


def list_skipped(skipped: Mapping[str | Path, str]) -> str:
    """The first few skipped images with their reasons, for a message."""
    return abbreviate(f"{name} ({reason})" for name, reason in skipped.items())
