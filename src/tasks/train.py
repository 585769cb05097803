"""`mode=train`: train a T2T-ViT, and write `training.json`, `training.png` and checkpoints."""

from __future__ import annotations

import inspect
import logging
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from munch import Munch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.loggers import CSVLogger
from rich.console import Console

from scatterbrain.attention import ATTENTIONS, create_attention, option_parameters
from scatterbrain.errors import UserError, check_switch, check_whole_number, is_number
from src.checkpoints import load_checkpoint
from src.datamodules.image_folder import ImageFolderDataModule
from src.distributed.launch import check_common_options, explained, launch
from src.evaluation.training import (
    TRAINING_FILE,
    TrainingSummary,
    best_epoch,
    training_table,
    typical_rate,
    write_training,
)
from src.tasks.build import attention_name, build, build_later, build_model
from src.tasks.checkpoints import (
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    LastCheckpoint,
    TrainingStopped,
    read_training_checkpoint,
    stop_on_interrupt,
)
from src.tasks.differences import differences
from src.tasks.provenance import (
    command_line,
    device_name,
    package_versions,
    peak_memory_mib,
    reset_peak_memory,
)
from src.tasks.training import CHECKPOINT_KEY, ClassificationTraining
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
            *("train_split", "holdout", "passes_per_epoch", "shuffle_shards", "on_device", "seed", "augmentation"),
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
    return launch(_train, config, finishes_on_sigterm=True)


def _train(config: DictConfig, trainer: Trainer) -> tuple[TrainingSummary, Munch]:
    """`train` in this process."""
    _check_trainer(config, trainer)
    output_dir = Path(config.paths.output_dir)
    resume = _checkpoint_to_resume(config)
    compared = {name: _plain(config, name) for name in COMPARED}
    earlier = None if resume is None else _read_earlier(resume, compared)
    finished = earlier is not None and len(earlier["history"]) == config.train.epochs

    seed_everything(config.seed, workers=True, verbose=False)
    datamodule: ImageFolderDataModule = build(config.datamodule, "datamodule")
    datamodule.setup("fit")
    model = build_model(config.model)
    started_from = {"path": None, "sha256": None} if earlier is None else earlier["config"]["started_from"]
    if earlier is None and config.train.ckpt is not None:
        checkpoint = Path(config.train.ckpt).expanduser()
        load_checkpoint(model, checkpoint, new_head=config.train.new_head)
        started_from = {"path": str(config.train.ckpt), "sha256": sha256_of_file(checkpoint)}
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
        make_optimizer=build_later(config.optimizer, "optimizer", lr=scale * config.optimizer.lr),
        make_scheduler=lambda optimizer: _make_scheduler(config, optimizer, scale, updates_per_epoch),
        seed=config.seed,
        redraw_steps=config.train.redraw_steps,
        compile_model=config.train.compile,
        run_config={**compared, "started_from": started_from},
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
    reset_peak_memory(trainer)
    stopped = None
    (last,) = (callback for callback in trainer.callbacks if isinstance(callback, LastCheckpoint))
    with stop_on_interrupt(last.ask_to_stop) as interrupted:
        try:
            if finished:
                logger.info("%s is of a finished training", resume)
                load_checkpoint(model, resume)
                task.history = earlier["history"]
            else:
                if earlier is not None:
                    logger.info("Going on from %s", resume)
                    _keep_metrics(trainer, updates=earlier["updates"])
                with explained(datamodule.batch_size, "train.compile" if config.train.compile else None):
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
        updates=earlier["updates"] if finished else trainer.global_step,
        images_per_update=images_per_update,
        learning_rate=scale * config.optimizer.lr,
        ema_decay=config.train.ema_decay if _averages(trainer) else None,
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
        if not finished or not (output_dir / TRAINING_FILE).exists():
            write_training(output_dir, summary)
        Console().print(training_table(summary))
        logger.info("Results: %s", output_dir / TRAINING_FILE)
        if stopped is not None:
            logger.info("%s", stopped)
        else:
            logger.info("To evaluate it: %s", _evaluation_command(config, summary))
    if interrupted.is_set():
        raise KeyboardInterrupt
    return summary, Munch(model=model, datamodule=datamodule, task=task, trainer=trainer)


def _check_options(config: DictConfig) -> None:
    """Check what no other part checks, before anything slow."""
    options = config.train
    check_common_options(config)
    check_whole_number("train.epochs", options.epochs, 1)
    for name in ("lr_batch", "redraw_steps"):
        if options[name] is not None:
            check_whole_number(f"train.{name}", options[name], 1)
    for name in ("compile", "new_head"):
        check_switch(f"train.{name}", options[name])
    decay = options.ema_decay
    if decay is not None and not (is_number(decay) and 0 <= decay < 1):
        raise UserError(f"train.ema_decay={decay} is not valid. Give a number of at least 0 and below 1, or null.")
    if options.ckpt == "???":  # OmegaConf's mark of a value not given
        raise UserError(
            "No checkpoint to fine-tune given. Give train.ckpt=/path/to/weights, or set CHECKPOINT=... in .env."
        )
    if options.new_head and options.ckpt is None:
        raise UserError("train.new_head=true leaves out the classifier of train.ckpt, which is not given. Give it.")
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "log_every_n_steps"):
        check_whole_number(f"trainer.{name}", config.trainer[name], 1)
    if config.trainer.get("max_time") is not None:
        raise UserError(
            "The time limit of a training is train.max_time=HH:MM:SS, which saves. Leave out trainer.max_time."
        )
    lr = config.optimizer.get("lr")
    if not (is_number(lr) and lr > 0):
        raise UserError(f"optimizer.lr={lr} is not valid. Give a learning rate above 0.")
    for name in ("warmup_epochs", "cooldown_epochs"):
        check_whole_number(f"scheduler.{name}", config.scheduler[name], 0)
    for group, name in (("optimizer", "weight_decay"), ("scheduler", "warmup_lr"), ("scheduler", "min_lr")):
        value = config[group].get(name, 0)
        if not (is_number(value) and value >= 0):
            raise UserError(f"{group}.{name}={value} is not valid. Give a number of at least 0.")


def _check_trainer(config: DictConfig, trainer: Trainer) -> None:
    """Refuse what would make a run that looks like a whole training and is none."""
    limits = (trainer.limit_train_batches, trainer.limit_val_batches)
    # 1.0 is all of them, but 1 is one batch
    if trainer.fast_dev_run or trainer.overfit_batches or any(not isinstance(x, float) or x != 1 for x in limits):
        raise UserError(
            "A training covers all images. Leave out trainer.limit_train_batches, trainer.limit_val_batches, "
            "trainer.overfit_batches and trainer.fast_dev_run; for fewer images, give a smaller folder."
        )
    if trainer.max_epochs != config.train.epochs or trainer.max_steps != -1:
        raise UserError("The length of a training is train.epochs. Leave out trainer.max_epochs and trainer.max_steps.")
    if not any(isinstance(callback, LastCheckpoint) for callback in trainer.callbacks):
        raise UserError("A training without callbacks.last saves nothing. Leave callbacks=train.")
    if _averages(trainer) and str(trainer.precision) in ("bf16-true", "16-true"):
        raise UserError(
            f"trainer.precision={trainer.precision} is too coarse for averaged weights, which would stand still. Use "
            "trainer.precision=bf16-mixed, or train.ema_decay=null."
        )


def _averages(trainer: Trainer) -> bool:
    return any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)


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
    old, new = ({name: options.get(name) for name in COMPARED} for options in (theirs, ours))
    different = differences(old, new)
    if different:
        raise UserError(
            f"{path} was trained with {', '.join(different)}. Give the same options to go on; or begin anew from its "
            f"weights with train.ckpt={path}."
        )


def _read_earlier(path: Path, compared: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint tells of the training so far, which has to be with the same options; and its `updates`."""
    checkpoint = read_training_checkpoint(path)
    earlier = {**checkpoint[CHECKPOINT_KEY], "updates": checkpoint["global_step"]}
    _check_same(compared, earlier["config"], path)
    return earlier


def _keep_metrics(trainer: Trainer, updates: int) -> None:
    """Rename the figures of a training's first `updates`, which Lightning's CSV logger would write over."""
    for trainer_logger in trainer.loggers:
        if isinstance(trainer_logger, CSVLogger) and trainer.is_global_zero:
            path = Path(trainer_logger.log_dir) / "metrics.csv"
            if path.exists():
                path.rename(path.with_name(f"metrics_to_{updates}.csv"))


def _make_scheduler(config: DictConfig, optimizer: Any, scale: float, updates_per_epoch: int) -> Any:
    """The scheduler of timm, which has to end with the training."""
    options = config.scheduler
    decaying = config.train.epochs - options.cooldown_epochs
    if decaying <= options.warmup_epochs:
        raise UserError(
            f"train.epochs={config.train.epochs} leaves no epoch between scheduler.warmup_epochs="
            f"{options.warmup_epochs} and scheduler.cooldown_epochs={options.cooldown_epochs}. Lower these."
        )
    if options.sched == "plateau":
        raise UserError("scheduler.sched=plateau follows a figure, which it is not told. Choose another one.")
    rates = {name: scale * options[name] for name in ("warmup_lr", "min_lr")}
    make = build_later(options, "scheduler", **rates)
    scheduler, num_epochs = make(optimizer, num_epochs=decaying, updates_per_epoch=updates_per_epoch)
    if scheduler is None:  # timm has come to refuse names that it does not know
        raise UserError(
            f"scheduler cannot be built: timm knows no sched={options.sched}. Choose another, such as cosine."
        )
    if num_epochs != config.train.epochs:
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
        **_attention_options(config.model, summary.attention),
        "model.num_classes": summary.data["num_classes"],
        "model.image_size": summary.image_size,
        "datamodule.data_dir": summary.data["dir"],
        "eval.ckpt": summary.checkpoints["last"],
    }
    defaults = inspect.signature(ImageFolderDataModule).parameters
    for name in ("test_split", "interpolation", "crop_pct", "mean", "std"):
        value = _plain(config.datamodule, name)
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
    stages = [_plain(model, f"t2tattn{stage}_cfg") or {} for stage in (1, 2)]
    if any(_is_changed(name, value, stage) for stage in stages for name, value in stage.items()):
        for number, stage in enumerate(stages, start=1):
            options |= {
                f"++model.t2tattn{number}_cfg.{name}": value
                for name, value in stage.items()
                if name != "name" and value is not None
            }
    return options


def _is_changed(name: str, value: Any, stage: Mapping[str, Any]) -> bool:
    """Whether an option of a stage's attention is not the default."""
    defaults = {
        **inspect.signature(create_attention).parameters,
        **option_parameters(ATTENTIONS[stage["name"]].module),
    }
    return name != "name" and value is not None and (name not in defaults or value != defaults[name].default)


def _quoted(value: Any) -> str:
    """A value as Hydra reads it."""
    if not isinstance(value, str) or re.fullmatch(r"[A-Za-z0-9_./:-]+", value):
        return str(value)
    return "'" + value.replace("'", r"\'") + "'"
