"""Checks of the options of an evaluation, before anything slow."""

from __future__ import annotations

from omegaconf import DictConfig
from pytorch_lightning import Trainer

from scatterbrain.errors import UserError, check_switch, check_whole_number, is_number
from src.tasks.options import check_common_options


def check_evaluation_options(config: DictConfig) -> None:
    """Check the group `eval` and what every mode takes.

    Raises:
        UserError: a value that is missing or not valid.
    """
    check_common_options(config)
    check_whole_number("eval.num_seeds", config.eval.num_seeds, 1)
    if config.eval.redraw not in (None, True, False):
        raise UserError(f"eval.redraw={config.eval.redraw!r} is not valid. Give true, false or null.")
    check_switch("eval.compile", config.eval.compile)
    check_switch("eval.resume", config.eval.resume)
    if not is_number(config.eval.save_seconds) or config.eval.save_seconds < 0:
        raise UserError(f"eval.save_seconds={config.eval.save_seconds!r} is not valid. Give seconds of at least 0.")
    if config.eval.ckpt is None:
        raise UserError(
            "No checkpoint given. Give eval.ckpt=/path/to/checkpoint, or set CHECKPOINT=/path in the file .env; "
            "scripts/download_checkpoint_t2t_vit.py fetches a published one."
        )


def check_covers_all_images(trainer: Trainer) -> None:
    """Refuse limits of the trainer: results of a part of the images would look like those of all.

    Raises:
        UserError: the trainer would leave out images.
    """
    limit = trainer.limit_test_batches  # an int counts batches, 1.0 is all of them
    if trainer.fast_dev_run or isinstance(limit, int) or limit != 1.0:
        raise UserError(
            "An evaluation covers all images. Leave out trainer.limit_test_batches and trainer.fast_dev_run; for fewer "
            "images, give a smaller folder."
        )
