"""`mode=train`: train a T2T-ViT, and write `training.json`, `training.png` and checkpoints."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from munch import Munch
from omegaconf import DictConfig
from pytorch_lightning import Trainer, seed_everything
from rich.console import Console

from scatterbrain.errors import UserError
from src.checkpoints import load_checkpoint
from src.datamodules.image_folder import ImageFolderDataModule
from src.distributed.folder_lock import locked_folder
from src.distributed.interrupts import stop_on_interrupt
from src.distributed.launch import launch
from src.distributed.loggers import started
from src.evaluation.training_summary import (
    TRAINING_FILE,
    TrainingSummary,
    best_epoch,
    is_written,
    median_rate,
    training_table,
    write_training,
)
from src.tasks.attention_info import attention_name
from src.tasks.build import build_model
from src.tasks.classification_training import ClassificationTraining
from src.tasks.environment import (
    device_name,
    package_versions,
    peak_memory_mib,
    reset_peak_memory,
)
from src.tasks.errors import explain_errors
from src.tasks.evaluation_command import evaluation_command
from src.tasks.optimization import make_scheduler, optimizer_factory
from src.tasks.training_checkpoints import BEST_CHECKPOINT, LAST_CHECKPOINT, LastCheckpoint, TrainingStopped
from src.tasks.training_options import averages_weights, check_covers_whole_training, check_training_options
from src.tasks.training_resume import (
    check_same_inputs,
    checkpoint_to_resume,
    compared_options,
    describe_images,
    keep_logged_metrics,
    read_earlier,
)
from src.utils.cli import command_line
from src.utils.files import sha256_of_file
from src.utils.instantiate import build

logger = logging.getLogger(__name__)


def train(config: DictConfig) -> tuple[TrainingSummary, Munch]:
    """Summary of a training on the train split, validated on the test split or on held-out training images.

    With several devices there is one process for each, and this one only watches them.

    Args:
        config: the composed configuration, see `configs/`.

    Returns:
        The summary (rank 0 also writes it to `config.paths.output_dir`), and the objects it comes from: `model` (the
        averaged weights, where they are averaged), `datamodule`, `task`, `trainer`; no objects where the processes
        were several.

    Raises:
        UserError: anything in the configuration, the data or a checkpoint that does not fit.
        KeyboardInterrupt: after Ctrl-C, once everything is written.
    """
    check_training_options(config)
    if config.train.ema_decay is None and "ema" in config.callbacks:
        config = config.copy()
        config.callbacks.ema = None
    with locked_folder(config.paths.output_dir):
        return launch(_train, config)


def _train(config: DictConfig, trainer: Trainer) -> tuple[TrainingSummary, Munch]:
    """`train` in this process."""
    check_covers_whole_training(config, trainer)
    output_dir = Path(config.paths.output_dir)
    resume = checkpoint_to_resume(config)
    compared = compared_options(config)
    earlier = None if resume is None else read_earlier(resume, compared)
    finished = earlier is not None and len(earlier["history"]) == config.train.epochs

    seed_everything(config.seed, workers=True, verbose=False)
    datamodule: ImageFolderDataModule = build(config.datamodule, "datamodule")
    datamodule.setup("fit")
    images = describe_images(datamodule)
    if earlier is not None:
        check_same_inputs(resume, earlier, config, images)
    model = build_model(config.model)
    started_from = {"path": None, "sha256": None} if earlier is None else earlier["config"]["started_from"]
    if earlier is None and config.train.ckpt is not None:
        checkpoint = Path(config.train.ckpt).expanduser()
        load_checkpoint(model, checkpoint, new_head=config.train.new_head, new_head_option="train.new_head=true")
        started_from = {"path": str(config.train.ckpt), "sha256": sha256_of_file(checkpoint)}
    attention = attention_name(config.model, model)
    if config.train.redraw_steps is not None and not model.has_random_features:
        raise UserError(
            f"train.redraw_steps={config.train.redraw_steps}, but attention {attention or 'of ' + config.model.name} "
            "has no random features. Leave it out, or choose model/t2tattn_cfg=performer or sblocal."
        )

    images_per_update = datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    scale = 1.0 if config.train.lr_batch is None else images_per_update / config.train.lr_batch
    updates_per_epoch = math.ceil(datamodule.num_train_batches(trainer.world_size) / trainer.accumulate_grad_batches)
    task = ClassificationTraining(
        model,
        num_classes=config.model.num_classes,
        make_optimizer=optimizer_factory(config, scale),
        make_scheduler=lambda optimizer: make_scheduler(config, optimizer, scale, updates_per_epoch),
        seed=config.seed,
        redraw_steps=config.train.redraw_steps,
        compile_model=config.train.compile,
        run_config={**compared, "started_from": started_from, "images": images},
    )
    logger.info(
        "Training %s with attention %s: %d epochs of %d updates of %d images, of %d in %s; validated on %d of %s",
        config.model.name,
        attention or "of its own",
        config.train.epochs,
        updates_per_epoch,
        images_per_update,
        len(datamodule.train_dataset),
        datamodule.train_dataset.root,
        len(datamodule.val_dataset),
        _validation_images(datamodule),
    )
    logger.info(
        "Learning rate %.3g: optimizer.lr=%g%s",
        scale * config.optimizer.lr,
        config.optimizer.lr,
        "" if config.train.lr_batch is None else f" times {images_per_update}/{config.train.lr_batch} (train.lr_batch)",
    )
    if averages_weights(trainer):
        warn_of_short_average(config.train.ema_decay, config.train.epochs * updates_per_epoch)
    reset_peak_memory(trainer)
    stopped = None
    (last,) = (callback for callback in trainer.callbacks if isinstance(callback, LastCheckpoint))
    with stop_on_interrupt(last.request_stop) as interrupted:
        try:
            if finished:
                logger.info("%s is of a finished training", resume)
                load_checkpoint(model, resume)
                task.history = earlier["history"]
            else:
                if earlier is not None:
                    logger.info("Resuming from %s", resume)
                    if len(earlier["history"]) == earlier["config"]["train.epochs"]:
                        logger.info(
                            "It is finished after %d epochs and is extended to train.epochs=%d: the learning rate "
                            "follows the schedule of that many epochs from here on.",
                            *(len(earlier["history"]), config.train.epochs),
                        )
                    keep_logged_metrics(trainer, updates=earlier["updates"])
                compiled = "train.compile" if config.train.compile else None
                with started(trainer.loggers), explain_errors(datamodule.batch_size, compiled):
                    trainer.fit(task, datamodule=datamodule, ckpt_path=resume)
        except TrainingStopped as stop:
            stopped = stop

    checkpoints = {name: output_dir / "checkpoints" / name for name in (BEST_CHECKPOINT, LAST_CHECKPOINT)}
    summary = TrainingSummary(
        model=config.model.name,
        attention=attention,
        started_from=started_from,
        data={
            "dir": str(config.datamodule.data_dir),
            "train": datamodule.train_split,
            "num_train_images": len(datamodule.train_dataset),
            "validation": _validation_images(datamodule),
            "num_validation_images": len(datamodule.val_dataset),
            "num_classes": config.model.num_classes,
        },
        image_size=config.model.image_size,
        precision=str(trainer.precision),
        device=device_name(trainer),
        seed=config.seed,
        epochs=config.train.epochs,
        complete=stopped is None,
        updates=earlier["updates"] if finished else trainer.global_step,
        images_per_update=images_per_update,
        learning_rate=scale * config.optimizer.lr,
        ema_decay=config.train.ema_decay if averages_weights(trainer) else None,
        best=best_epoch(task.history),
        checkpoints={name.removesuffix(".ckpt"): str(path) for name, path in checkpoints.items() if path.exists()},
        images_per_second=median_rate(task.history),
        seconds=sum(entry["seconds"] for entry in task.history),
        peak_memory_mib=peak_memory_mib(trainer),
        versions=package_versions(),
        command=command_line(),
        history=task.history,
    )
    if trainer.is_global_zero:
        # a process that was killed at its end may have left files of an earlier part
        if not finished or not is_written(output_dir, summary):
            write_training(output_dir, summary)
        Console().print(training_table(summary))
        logger.info("Results: %s", output_dir / TRAINING_FILE)
        if stopped is not None:
            logger.info("%s", stopped)
        else:
            logger.info("To evaluate it: %s", evaluation_command(config, summary))
    if interrupted.is_set():
        raise KeyboardInterrupt
    return summary, Munch(model=model, datamodule=datamodule, task=task, trainer=trainer)


def warn_of_short_average(decay: float, updates: int) -> None:
    """Log a warning where an average over so many updates is mostly of the weights that training starts from."""
    if (kept := decay**updates) > 0.1:
        logger.warning(
            "With train.ema_decay=%g, %s updates leave %.1f %% of the starting weights in the averaged weights, which "
            "are validated and saved. Give train.ema_decay=%.4g for so short a training, or null for no averaging.",
            decay,
            f"{updates:,}",
            100 * kept,
            max(0.0, 1 - 10 / updates),
        )


def _validation_images(datamodule: ImageFolderDataModule) -> str:
    """Name of the images that training is validated on."""
    held_out = f"{datamodule.train_split}, held out"
    return held_out if datamodule.holdout > 0 else datamodule.test_split
