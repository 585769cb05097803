"""`train.resume`: the checkpoint to resume from, which has to be of a training with the same options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger

from scatterbrain.errors import UserError
from src.datamodules.image_folder import ImageFolderDataModule
from src.tasks.classification_training import CHECKPOINT_KEY
from src.tasks.option_changes import option_changes
from src.tasks.resume_state import data_digests
from src.tasks.training_checkpoints import LAST_CHECKPOINT, read_training_checkpoint
from src.utils.files import sha256_of_file

# Options that must be the same in a resumed training: all but paths and those that change its speed alone.
COMPARED = (
    *("seed", "model", "optimizer", "scheduler"),
    *(f"train.{name}" for name in ("new_head", "epochs", "lr_batch", "ema_decay", "redraw_steps")),
    *(f"trainer.{name}" for name in ("precision", "devices", "num_nodes", "accumulate_grad_batches")),
    *("trainer.gradient_clip_val", "trainer.gradient_clip_algorithm", "trainer.check_val_every_n_epoch"),
    *(
        f"datamodule.{name}"
        for name in (
            *("batch_size", "image_size", "num_classes", "interpolation", "crop_pct", "mean", "std", "test_split"),
            *("train_split", "holdout", "passes_per_epoch", "shuffle_shards", "on_device", "seed", "augmentation"),
            *("class_order", "labels"),
        )
    ),
)


def compared_options(config: DictConfig) -> dict[str, Any]:
    """The options that must be the same in a resumed training, by their full names."""
    return {name: plain_option(config, name) for name in COMPARED}


def plain_option(config: DictConfig, name: str) -> Any:
    """An option or group of the configuration as plain types."""
    part = OmegaConf.select(config, name)
    return OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part


def checkpoint_to_resume(config: DictConfig) -> Path | None:
    """The checkpoint to resume from; None for a new training.

    Raises:
        UserError: the output folder holds a training that `train.resume` does not name.
    """
    output_dir = Path(config.paths.output_dir)
    own, resume = output_dir / "checkpoints" / LAST_CHECKPOINT, config.train.resume
    if resume is True:
        return own if own.exists() else None
    if own.exists() and (not resume or Path(resume).expanduser().resolve() != own.resolve()):
        raise UserError(
            f"{output_dir} holds a training already. train.resume=true resumes it; or choose another hydra.run.dir."
        )
    return None if resume is False or resume is None else Path(resume).expanduser()


def read_earlier(path: Path, compared: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a training checkpoint that describe the training so far, with its number of `updates`.

    Args:
        path: the checkpoint.
        compared: see `compared_options`; `train.epochs` may be more than those of a finished training.

    Raises:
        UserError: the checkpoint cannot be read, or is of a training with other options.
    """
    checkpoint = read_training_checkpoint(path)
    earlier = {**checkpoint[CHECKPOINT_KEY], "updates": checkpoint["global_step"]}
    # trainings of earlier versions do not have these options
    later = {
        "datamodule.class_order": "sorted",
        "datamodule.labels": "auto",
        "train.new_head": compared.get("train.new_head"),
    }
    before = {name: value for name, value in later.items() if compared.get(name) is not None} | earlier["config"]
    if len(earlier["history"]) == before["train.epochs"]:  # finished, so it can be extended
        before["train.epochs"] = max(before["train.epochs"], compared["train.epochs"])
    changes = option_changes({name: before.get(name) for name in compared}, compared)
    if changes:
        raise _other_training(path, f"with {', '.join(changes)}", "options")
    return earlier


def check_same_inputs(
    path: Path, earlier: Mapping[str, Any], config: DictConfig, inputs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse to resume a training with other images, or from other weights, than it began with.

    Args:
        path: the checkpoint.
        earlier: see `read_earlier`.
        config: of this training.
        inputs: see `describe_images`.

    Raises:
        UserError: they differ, see above.
    """
    started_from, ckpt = earlier["config"]["started_from"], config.train.ckpt
    # weights that have been deleted since are not needed
    if ckpt is None or str(ckpt) != started_from["path"] or Path(ckpt).expanduser().exists():
        sha256 = None if ckpt is None else sha256_of_file(Path(ckpt).expanduser())
        if sha256 != started_from["sha256"]:
            change = f"train.ckpt={started_from['path']} (now {ckpt})"
            if str(ckpt) == started_from["path"]:
                change = f"other weights in train.ckpt={ckpt}"
            raise _other_training(path, f"with {change}", "train.ckpt")
    # trainings of earlier versions do not have all of them
    before = earlier["config"].get("images", {})
    changes = option_changes({name: images | before.get(name, {}) for name, images in inputs.items()}, inputs)
    if changes:
        raise _other_training(
            path,
            f"on other images than those of datamodule.data_dir={config.datamodule.data_dir}: {', '.join(changes)}",
            "images",
        )


def describe_images(datamodule: ImageFolderDataModule) -> dict[str, dict[str, Any]]:
    """Number and digests of the images for training and of those for validation."""
    datasets = {"train": datamodule.train_dataset, "validation": datamodule.val_dataset}
    return {name: {"num_images": len(dataset)} | data_digests(dataset) for name, dataset in datasets.items()}


def _other_training(path: Path, difference: str, same: str) -> UserError:
    return UserError(
        f"{path} was trained {difference}. Give the same {same} to resume; or start again from its weights with "
        f"train.ckpt={path}."
    )


def keep_logged_metrics(trainer: Trainer, updates: int) -> None:
    """Rename the metrics file of a training's first `updates`, which Lightning's CSV logger would overwrite."""
    for trainer_logger in trainer.loggers:
        if isinstance(trainer_logger, CSVLogger) and trainer.is_global_zero:
            path = Path(trainer_logger.log_dir) / "metrics.csv"
            if path.exists():
                path.rename(path.with_name(f"metrics_to_{updates}.csv"))
