"""`mode=sequence`: train a network on sequences from scratch, and write `sequence_training.json` and checkpoints."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from munch import Munch
from omegaconf import DictConfig, open_dict
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.utilities.exceptions import SIGTERMException
from rich.console import Console

from scatterbrain.attention import attention_memory
from scatterbrain.errors import UserError, check_switch, check_whole_number, is_number
from src.datamodules.sequences.datamodule import METRICS, SequenceDataModule
from src.distributed.folder_lock import locked_folder
from src.distributed.interrupts import stop_on_interrupt
from src.distributed.launch import launch
from src.distributed.loggers import started
from src.evaluation.sequence_summary import SequenceSummary, summary_table, write_summary
from src.models.sequence_network import Network
from src.tasks.classification_training import CHECKPOINT_KEY, NotFiniteError
from src.tasks.environment import device_name, package_versions, peak_memory_mib, reset_peak_memory
from src.tasks.errors import explain_errors
from src.tasks.optimization import optimizer_factory
from src.tasks.option_changes import option_changes
from src.tasks.options import check_common_options
from src.tasks.sequence_training import SequenceTraining, best_entry
from src.tasks.training_checkpoints import (
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    LastCheckpoint,
    TrainingStopped,
    read_training_checkpoint,
)
from src.tasks.training_resume import checkpoint_to_resume, keep_logged_metrics, plain_option
from src.utils.cli import command_line
from src.utils.instantiate import build

logger = logging.getLogger(__name__)

# Options that must be the same in a resumed training: all but paths and those that change its speed alone.
COMPARED = (
    *("name", "seed", "model", "optimizer", "scheduler"),
    *(f"train.{name}" for name in ("steps", "eval_steps", "redraw_steps")),
    *("trainer.precision", "trainer.gradient_clip_val"),
    *(f"datamodule.{name}" for name in ("length", "causal", "batch_size", "metric", "seed")),
    *("datamodule.validation_samples", "datamodule.eval_windows"),
)


def train_sequence(config: DictConfig) -> tuple[SequenceSummary, Munch]:
    """Summary of a training from random weights, evaluated on the validation part and at the end on the test part.

    Args:
        config: the composed configuration, see `configs/mode/sequence.yaml`.

    Returns:
        The summary, which is also written to `config.paths.output_dir`, and the objects it comes from: `model`,
        `datamodule`, `task`, `trainer`.

    Raises:
        UserError: anything in the configuration, the data or a checkpoint that does not fit.
        KeyboardInterrupt: after Ctrl-C, once everything is written.
        SystemExit: likewise after SIGTERM, with status 143.
    """
    _check_options(config)
    config = config.copy()
    with open_dict(config):
        config.trainer.max_epochs = math.ceil(config.train.steps / config.train.eval_steps)
        if config.trainer.precision == "auto":
            on_cuda = torch.cuda.is_available() and config.trainer.accelerator in ("auto", "gpu", "cuda")
            config.trainer.precision = "bf16-mixed" if on_cuda else "32-true"
    with locked_folder(config.paths.output_dir):
        return launch(_train, config)


def _check_options(config: DictConfig) -> None:
    """Check the options, before anything slow."""
    check_common_options(config)
    options, trainer = config.train, config.trainer
    check_whole_number("train.steps", options.steps, 1)
    check_whole_number("train.eval_steps", options.eval_steps, 1)
    if options.redraw_steps is not None:
        check_whole_number("train.redraw_steps", options.redraw_steps, 1)
    check_switch("train.compile", options.compile)
    check_whole_number("trainer.log_every_n_steps", trainer.log_every_n_steps, 1)
    clip = trainer.gradient_clip_val
    if clip is not None and not (is_number(clip) and clip >= 0):
        raise UserError(f"trainer.gradient_clip_val={clip} is not valid. Give a number of at least 0, or null.")
    if not (is_number(config.optimizer.lr) and config.optimizer.lr > 0):
        raise UserError(f"optimizer.lr={config.optimizer.lr} is not valid. Give a learning rate above 0.")
    given = [name for name in ("max_epochs", "max_steps", "max_time", "accumulate_grad_batches") if name in trainer]
    if given:
        raise UserError(
            f"A training on sequences has no trainer.{given[0]}. Its length is train.steps, or train.max_time=HH:MM:SS."
        )


def _train(config: DictConfig, trainer: Trainer) -> tuple[SequenceSummary, Munch]:
    """`train_sequence` in this process."""
    last = next((callback for callback in trainer.callbacks if isinstance(callback, LastCheckpoint)), None)
    if last is None:
        raise UserError("A training without callbacks.last saves nothing. Leave callbacks=train.")
    if trainer.world_size > 1:
        raise UserError(
            f"A training on sequences runs on one device, not on {trainer.world_size}. Give trainer.devices=1."
        )
    output_dir = Path(config.paths.output_dir)
    resume = checkpoint_to_resume(config)
    seed_everything(config.seed, workers=True, verbose=False)
    datamodule: SequenceDataModule = build(config.datamodule, "datamodule")
    datamodule.setup("fit")
    data = datamodule.describe()
    compared = {name: plain_option(config, name) for name in COMPARED} | {"data": data["sha256"]}
    earlier = None if resume is None else _read_earlier(resume, compared)

    model: Network = build(config.model, "model")
    if (model.pool == "none") != datamodule.each_token:
        what = "each token" if datamodule.each_token else "each sequence"
        raise UserError(
            f"model.pool={model.pool}, but the data has a target for {what}. Give model.pool="
            f"{'none' if datamodule.each_token else 'cls or mean'}."
        )
    task = SequenceTraining(
        model,
        metric=datamodule.metric,
        make_optimizer=optimizer_factory(config, 1.0),
        learning_rate=build(config.scheduler, "scheduler", steps=config.train.steps),
        steps=config.train.steps,
        seed=config.seed,
        redraw_steps=config.train.redraw_steps,
        compile_model=config.train.compile,
        run_config=compared,
    )
    attention = model.blocks[0].attention
    num_keys = config.model.length + (model.pool == "cls")
    logger.info(
        "Training on %s with attention %s (%s): %s steps of %d sequences of up to %s tokens, of %s",
        config.name,
        config.model.attention.name,
        ", ".join(f"{name} {size}" for name, size in attention.sizes().items()) or "no sizes",
        f"{config.train.steps:,}",
        datamodule.batch_size,
        f"{datamodule.length:,}",
        f"{data['num_train']:,} {data['unit']}",
    )
    reset_peak_memory(trainer)
    attention_options = plain_option(config, "model.attention")
    name = attention_options.pop("name")
    checkpoints = {each: output_dir / "checkpoints" / each for each in (BEST_CHECKPOINT, LAST_CHECKPOINT)}

    def reached() -> SequenceSummary:
        """The summary of an unfinished training."""
        history = task.history
        return SequenceSummary(
            task=config.name,
            attention=name,
            options={option: value for option, value in attention_options.items() if value is not None},
            sizes=attention.sizes(),
            memory=attention_memory(attention, num_keys),
            metric=datamodule.metric,
            higher_is_better=METRICS[datamodule.metric],
            seed=config.seed,
            data=data,
            length=datamodule.length,
            batch_size=datamodule.batch_size,
            parameters=sum(weight.numel() for weight in model.parameters()),
            precision=str(trainer.precision),
            device=device_name(trainer),
            learning_rate=config.optimizer.lr,
            steps=config.train.steps,
            steps_done=trainer.global_step,
            complete=False,
            error=None,
            validation=history[-1] if history else None,
            best=best_entry(history, datamodule.metric) if history else None,
            test=None,
            tokens_per_second=task.tokens_per_second,
            seconds=task.training_seconds,
            total_seconds=task.total_seconds,
            peak_memory_mib=peak_memory_mib(trainer),
            checkpoints={each.removesuffix(".ckpt"): str(path) for each, path in checkpoints.items() if path.exists()},
            versions=package_versions(),
            command=command_line(),
            history=history,
        )

    # a process that is killed, as by a limit of time or memory, leaves what it reached
    task.after_evaluation = lambda: write_summary(output_dir, reached())
    stopped = diverged = None
    finished = earlier is not None and earlier["step"] == config.train.steps
    explained = explain_errors(datamodule.batch_size, "train.compile" if config.train.compile else None)
    with stop_on_interrupt(last.request_stop) as interrupted, started(trainer.loggers), explained:
        try:
            if finished:
                logger.info("%s is of a finished training", resume)
                _restore(task, resume)
            else:
                if earlier is not None:
                    logger.info("Resuming from %s", resume)
                    keep_logged_metrics(trainer, updates=earlier["step"])
                trainer.fit(task, datamodule=datamodule, ckpt_path=resume)
        except TrainingStopped as stop:
            stopped = stop
        except NotFiniteError as error:  # a result too, of these options
            diverged = error
        peak = peak_memory_mib(trainer)
        steps_done = earlier["step"] if finished else trainer.global_step
        tested = diverged is None and not last.stop_requested
        if tested:
            try:
                trainer.test(task, datamodule=datamodule, verbose=False)
            except SIGTERMException:  # a resumed training tests the last checkpoint
                tested = False
            if trainer.received_sigterm:  # in the last step of the test too, after which it is not raised
                last.request_stop()

    summary = replace(
        reached(),
        steps_done=steps_done,
        complete=stopped is None and diverged is None,
        error=None if diverged is None else str(diverged),
        test=task.test if tested else None,
        peak_memory_mib=peak,
    )
    path = write_summary(output_dir, summary)
    Console().print(summary_table(summary))
    logger.info("Results: %s", path)
    if stopped is not None:
        logger.info("%s", stopped)
    if interrupted.is_set():
        raise KeyboardInterrupt
    if diverged is not None:
        raise diverged
    if last.stop_requested:
        raise SystemExit(128 + signal.SIGTERM)  # as of a process that the signal ends
    return summary, Munch(model=model, datamodule=datamodule, task=task, trainer=trainer)


def _read_earlier(path: Path, compared: Mapping[str, Any]) -> dict[str, Any]:
    """The step and the history of a checkpoint.

    Raises:
        UserError: the checkpoint cannot be read, or is of a training with other options or data.
    """
    checkpoint = read_training_checkpoint(path)
    before = checkpoint[CHECKPOINT_KEY]["config"]
    changes = option_changes({name: before.get(name) for name in compared}, compared)
    if changes:
        raise UserError(
            f"{path} was trained with {', '.join(changes)}. Give the same options and data to resume, or choose "
            "another hydra.run.dir."
        )
    return {"step": checkpoint["global_step"]}


def _restore(task: SequenceTraining, path: Path) -> None:
    """Load weights and history of a finished training."""
    checkpoint = read_training_checkpoint(path)
    task.load_state_dict(checkpoint["state_dict"])
    task.on_load_checkpoint(checkpoint)
