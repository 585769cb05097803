"""Checks of the options of a training, before anything slow."""

from __future__ import annotations

from omegaconf import DictConfig
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import WeightAveraging

from scatterbrain.errors import UserError, check_switch, check_whole_number, is_number
from src.tasks.options import check_common_options
from src.tasks.training_checkpoints import LastCheckpoint


def check_training_options(config: DictConfig) -> None:
    """Check the groups `train`, `optimizer` and `scheduler`, and what every mode takes.

    Raises:
        UserError: a value that is missing or not valid.
    """
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
    if options.ckpt == "???":  # OmegaConf's marker of a missing value
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
    clip = config.trainer.gradient_clip_val
    if clip is not None and not (is_number(clip) and clip >= 0):
        raise UserError(f"trainer.gradient_clip_val={clip} is not valid. Give a number of at least 0, or null.")


def check_covers_whole_training(config: DictConfig, trainer: Trainer) -> None:
    """Refuse options of the trainer that would leave out images, epochs, checkpoints or updates of the average.

    Raises:
        UserError: such an option.
    """
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
    if averages_weights(trainer) and str(trainer.precision) in ("bf16-true", "16-true"):
        raise UserError(
            f"trainer.precision={trainer.precision} is too coarse for averaged weights, which would not change. Use "
            "trainer.precision=bf16-mixed, or train.ema_decay=null."
        )


def averages_weights(trainer: Trainer) -> bool:
    """Whether the trainer keeps an average of the weights."""
    return any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
