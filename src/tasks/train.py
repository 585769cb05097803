"""`mode=train`: train a T2T-ViT, and write `training.json`, `training.png` and checkpoints."""

from __future__ import annotations

import functools
import logging
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from munch import Munch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import WeightAveraging
from rich.console import Console

from src.datamodules.image_folder import ImageFolderDataModule
from src.evaluation.training import (
    TRAINING_FILE,
    TrainingSummary,
    best_epoch,
    training_table,
    typical_rate,
    write_training,
)
from src.tasks.build import attention_name, build, build_model
from src.tasks.checkpoints import (
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    LastCheckpoint,
    TrainingStopped,
    read_training_checkpoint,
    stop_on_interrupt,
)
from src.tasks.evaluate import MAX_SEED
from src.tasks.launch import explained, launch
from src.tasks.provenance import (
    command_line,
    device_name,
    package_versions,
    peak_memory_mib,
    reset_peak_memory,
)
from src.tasks.training import CHECKPOINT_KEY, ClassificationTraining
from src.utils.checkpoint import load_checkpoint
from src.utils.errors import UserError, check_whole_number
from src.utils.files import sha256_of_file

logger = logging.getLogger(__name__)

# What must be the same when a training goes on: everything but where things are and how fast they go.
COMPARED = (
    *("seed", "model", "optimizer", "scheduler"),
    *(f"train.{name}" for name in ("epochs", "lr_batch", "ema_decay", "redraw_steps")),
    *(f"trainer.{name}" for name in ("precision", "devices", "num_nodes", "accumulate_grad_batches")),
    *("trainer.gradient_clip_val", "trainer.check_val_every_n_epoch"),
    *(
        f"datamodule.{name}"
        for name in (
            *("batch_size", "image_size", "num_classes", "interpolation", "crop_pct", "mean", "std", "test_split"),
            *("train_split", "holdout", "passes_per_epoch", "seed", "augmentation"),
        )
    ),
)


def train(config: DictConfig) -> tuple[TrainingSummary, Munch]:
    """Train on the train split, watched on the test split or on held-out training images.

    With several devices there is one process for each, and this one only watches them.

    Args:
        config: the composed configuration, see `configs/`.

    Returns:
        The summary (also written to `config.paths.output_dir` by the first process), and the objects it comes from:
        `model` (the averaged weights, where they are averaged), `datamodule`, `task`, `trainer`; none of them where
        the processes were several.

    Raises:
        UserError: anything in the configuration, the data or a checkpoint that does not fit.
        KeyboardInterrupt: after Ctrl-C, once everything is written.
    """
    _check_options(config)
    if config.train.ema_decay is None and "ema" in config.callbacks:
        config = config.copy()
        config.callbacks.ema = None
    return launch(_train, config)


def _train(config: DictConfig, trainer: Trainer) -> tuple[TrainingSummary, Munch]:
    """`train` in this process."""
    _check_trainer(config, trainer)
    output_dir = Path(config.paths.output_dir)
    resume = _checkpoint_to_resume(config)
    compared = {name: _plain(config, name) for name in COMPARED}
    if resume is not None:
        _check_same(compared, read_training_checkpoint(resume)[CHECKPOINT_KEY]["config"], resume)

    seed_everything(config.seed, workers=True, verbose=False)
    datamodule: ImageFolderDataModule = build(config.datamodule, "datamodule")
    datamodule.setup("fit")
    model = build_model(config.model)
    started_from = {"path": None, "sha256": None}
    if config.train.ckpt is not None:
        checkpoint = Path(config.train.ckpt).expanduser()
        started_from = {"path": str(config.train.ckpt), "sha256": sha256_of_file(checkpoint)}
        if resume is None:
            load_checkpoint(model, checkpoint, new_head=config.train.new_head)
    if config.train.redraw_steps is not None and not model.has_random_features:
        raise UserError(
            f"train.redraw_steps={config.train.redraw_steps}, but this attention draws nothing. Leave it out, or "
            "choose model/t2tattn_cfg=performer or sblocal."
        )

    images_per_update = datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    scale = 1.0 if config.train.lr_batch is None else images_per_update / config.train.lr_batch
    updates_per_epoch = math.ceil(datamodule.num_train_batches(trainer.world_size) / trainer.accumulate_grad_batches)
    task = ClassificationTraining(
        model,
        num_classes=config.model.num_classes,
        make_optimizer=_factory(config.optimizer, "optimizer", lr=scale * config.optimizer.lr),
        make_scheduler=lambda optimizer: _make_scheduler(config, optimizer, scale, updates_per_epoch),
        seed=config.seed,
        redraw_steps=config.train.redraw_steps,
        compile_model=config.train.compile,
        run_config=compared,
    )
    attention = attention_name(config.model, model)
    logger.info(
        "Training %s with attention %s: %d epochs of %d updates of %d images, of %d in %s; watched on %d of %s",
        config.model.name,
        attention or "of its own",
        config.train.epochs,
        updates_per_epoch,
        images_per_update,
        len(datamodule.train_dataset),
        datamodule.train_dataset.root,
        len(datamodule.val_dataset),
        _watched(datamodule),
    )
    if resume is not None:
        logger.info("Going on from %s", resume)
    reset_peak_memory(trainer)
    stopped = None
    (last,) = (callback for callback in trainer.callbacks if isinstance(callback, LastCheckpoint))
    with stop_on_interrupt(last.ask_to_stop):
        try:
            with explained(datamodule.batch_size, "train.compile" if config.train.compile else None):
                trainer.fit(task, datamodule=datamodule, ckpt_path=resume)
        except TrainingStopped as stop:
            stopped = stop

    checkpoints = {name: output_dir / "checkpoints" / name for name in (BEST_CHECKPOINT, LAST_CHECKPOINT)}
    averaged = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
    summary = TrainingSummary(
        model=config.model.name,
        attention=attention,
        started_from=started_from,
        data={
            "dir": str(config.datamodule.data_dir),
            "train": datamodule.train_split,
            "num_train_images": len(datamodule.train_dataset),
            "watched": _watched(datamodule),
            "num_watched_images": len(datamodule.val_dataset),
            "num_classes": config.model.num_classes,
        },
        image_size=config.model.image_size,
        precision=str(trainer.precision),
        device=device_name(trainer),
        seed=config.seed,
        epochs=config.train.epochs,
        complete=stopped is None,
        updates=trainer.global_step,
        images_per_update=images_per_update,
        learning_rate=scale * config.optimizer.lr,
        ema_decay=config.train.ema_decay if averaged else None,
        best=best_epoch(task.history),
        checkpoints={name.removesuffix(".ckpt"): str(path) for name, path in checkpoints.items() if path.exists()},
        images_per_second=typical_rate(task.history),
        seconds=sum(entry["seconds"] for entry in task.history),
        peak_memory_mib=peak_memory_mib(trainer),
        versions=package_versions(),
        command=command_line(),
        history=task.history,
    )
    if trainer.is_global_zero:
        write_training(output_dir, summary)
        Console().print(training_table(summary))
        logger.info("Results: %s", output_dir / TRAINING_FILE)
        if stopped is not None:
            logger.info("%s", stopped)
        else:
            logger.info("To evaluate it: %s", _evaluation_command(config, summary))
    if last.asked_to_stop:
        raise KeyboardInterrupt
    return summary, Munch(model=model, datamodule=datamodule, task=task, trainer=trainer)


def _check_options(config: DictConfig) -> None:
    """Check what no other part checks, before anything slow."""
    options = config.train
    check_whole_number("seed", config.seed, 0, MAX_SEED)
    check_whole_number("model.image_size", config.model.image_size, 1)
    check_whole_number("model.num_classes", config.model.num_classes, 1)
    check_whole_number("train.epochs", options.epochs, 1)
    for name in ("lr_batch", "redraw_steps"):
        if options[name] is not None:
            check_whole_number(f"train.{name}", options[name], 1)
    for name in ("compile", "new_head"):
        if not isinstance(options[name], bool):
            raise UserError(f"train.{name}={options[name]!r} is not valid. Give true or false.")
    decay = options.ema_decay
    if decay is not None and (isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1):
        raise UserError(f"train.ema_decay={decay} is not valid. Give a number of at least 0 and below 1, or null.")
    if options.new_head and options.ckpt is None:
        raise UserError("train.new_head=true leaves out the classifier of train.ckpt, which is not given. Give it.")
    lr = config.optimizer.get("lr")
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not lr > 0:
        raise UserError(f"optimizer.lr={lr} is not valid. Give a learning rate above 0.")


def _check_trainer(config: DictConfig, trainer: Trainer) -> None:
    """Refuse what would make a run that looks like a whole training and is none."""
    if trainer.max_epochs != config.train.epochs or trainer.max_steps != -1:
        raise UserError("The length of a training is train.epochs. Leave out trainer.max_epochs and trainer.max_steps.")
    if trainer.fast_dev_run or trainer.limit_train_batches != 1.0 or trainer.limit_val_batches != 1.0:
        raise UserError(
            "A training covers all images. Leave out trainer.limit_train_batches, trainer.limit_val_batches and "
            "trainer.fast_dev_run; for fewer images, give a smaller folder."
        )
    if config.trainer.get("max_time") is not None:
        raise UserError(
            "The time limit of a training is train.max_time=HH:MM:SS, which saves. Leave out trainer.max_time."
        )
    if not any(isinstance(callback, LastCheckpoint) for callback in trainer.callbacks):
        raise UserError("A training without callbacks.last saves nothing. Leave callbacks=train.")


def _checkpoint_to_resume(config: DictConfig) -> Path | None:
    """The checkpoint to go on from, if any."""
    output_dir = Path(config.paths.output_dir)
    own, resume = output_dir / "checkpoints" / LAST_CHECKPOINT, config.train.resume
    if resume is True:
        return own if own.exists() else None
    if own.exists() and (not resume or Path(resume).expanduser().resolve() != own.resolve()):
        raise UserError(
            f"{output_dir} holds a training already. train.resume=true goes on with it; or choose another "
            "hydra.run.dir."
        )
    return None if resume is False or resume is None else Path(resume).expanduser()


def _plain(config: DictConfig, name: str) -> Any:
    """A part of the configuration as plain types."""
    part = OmegaConf.select(config, name)
    return OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part


def _check_same(ours: dict[str, Any], theirs: dict[str, Any], path: Path) -> None:
    """Raise a UserError that names the options which differ."""
    different = []
    for name in COMPARED:
        if ours[name] == theirs.get(name):
            continue
        if isinstance(ours[name], dict) and isinstance(theirs.get(name), dict):
            keys = dict.fromkeys([*ours[name], *theirs[name]])
            pairs = [(f"{name}.{key}", theirs[name].get(key), ours[name].get(key)) for key in keys]
        else:
            pairs = [(name, theirs.get(name), ours[name])]
        different += [f"{option}={old} (now {new})" for option, old, new in pairs if old != new]
    if different:
        raise UserError(
            f"{path} was trained with {', '.join(different)}. Give the same options to go on; or begin anew from its "
            f"weights with train.ckpt={path}."
        )


def _factory(config: DictConfig, group: str, **changes: Any) -> Callable[..., Any]:
    """The function of a config's `_target_` with its options; its complaints become errors that name the group."""
    # the objects it is applied to must not pass through the instantiation, which copies
    partial = hydra.utils.instantiate(config, _partial_=True, **changes)

    @functools.wraps(partial.func)
    def make(*arguments: Any, **options: Any) -> Any:
        try:
            return partial(*arguments, **options)
        except (AssertionError, TypeError, ValueError, ZeroDivisionError) as error:
            reason = str(error).strip().rstrip(".!") or type(error).__name__
            raise UserError(f"{group} cannot be built: {reason}. Check the options under '{group}'.") from error

    return make


def _make_scheduler(config: DictConfig, optimizer: Any, scale: float, updates_per_epoch: int) -> Any:
    """The scheduler of timm, which has to end with the training."""
    options = config.scheduler
    decaying = config.train.epochs - options.cooldown_epochs
    if decaying <= options.warmup_epochs:
        raise UserError(
            f"train.epochs={config.train.epochs} leaves no epoch between scheduler.warmup_epochs="
            f"{options.warmup_epochs} and scheduler.cooldown_epochs={options.cooldown_epochs}. Lower these."
        )
    rates = {name: scale * options[name] for name in ("warmup_lr", "min_lr")}
    make = _factory(options, "scheduler", **rates)
    scheduler, num_epochs = make(optimizer, num_epochs=decaying, updates_per_epoch=updates_per_epoch)
    if scheduler is None or num_epochs != config.train.epochs:
        raise UserError(
            f"scheduler.sched={options.sched} does not end with train.epochs={config.train.epochs}, but with "
            f"{num_epochs}. Choose another, such as cosine."
        )
    return scheduler


def _watched(datamodule: ImageFolderDataModule) -> str:
    """Name of the images that training is watched on."""
    held_out = f"{datamodule.train_split}, held out"
    return held_out if datamodule.holdout > 0 else datamodule.test_split


def _evaluation_command(config: DictConfig, summary: TrainingSummary) -> str:
    """Command that evaluates the training's last weights."""
    options = {
        "experiment": "imagenet-t2tvit-eval",
        "model/t2tmodel": summary.model,
        "model/t2tattn_cfg": summary.attention,
        "model.num_classes": summary.data["num_classes"],
        "model.image_size": summary.image_size,
        "datamodule.data_dir": summary.data["dir"],
        "eval.ckpt": summary.checkpoints["last"],
    }
    arguments = [f"{name}={value}" for name, value in options.items() if value is not None]
    return shlex.join(["python", "run.py", *arguments])
