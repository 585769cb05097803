"""Lightning's loggers: started before the work, so that one which fails costs none of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger, WandbLogger

from scatterbrain.errors import UserError
from src.utils.instantiate import build_group
from src.utils.text import first_line

# Values of WANDB_MODE with which no account is needed.
_WITHOUT_LOGIN = ("offline", "dryrun", "disabled")


def build_loggers(config: DictConfig | None) -> list[Logger]:
    """The loggers of the group `logger`.

    Raises:
        UserError: one that is not installed or refuses its options, or wandb without a login.
    """
    loggers = build_group(config, "logger")
    for logger in loggers:
        if isinstance(logger, WandbLogger) and not config.wandb.get("offline"):
            _check_wandb_login()
    return loggers


@contextmanager
def started(loggers: Sequence[Logger]) -> Iterator[None]:
    """Start the loggers, and end the run of wandb afterwards, or the next run of this process would log into it.

    Raises:
        UserError: one cannot be started: its server does not answer, for example.
    """
    try:
        for logger in loggers:
            with _errors_of(logger):
                logger.experiment  # noqa: B018, connects
        yield
    finally:
        for logger in loggers:
            if isinstance(logger, WandbLogger) and logger._experiment is not None:
                logger._experiment.finish()


def log_results(loggers: Sequence[Logger], metrics: Mapping[str, float]) -> None:
    """Log the metrics of a test as Lightning does.

    Raises:
        UserError: a logger fails.
    """
    with started(loggers):
        for logger in loggers:
            with _errors_of(logger):
                logger.log_metrics({"epoch": 0, **metrics}, step=0)
                logger.save()
                logger.finalize("success")


@contextmanager
def _errors_of(logger: Logger) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each package has its own
        raise UserError(
            f"{type(logger).__name__} failed: {first_line(error)}. Check its options under 'logger', its server and "
            "login; or choose logger=csv, which needs neither."
        ) from error


def _check_wandb_login() -> None:
    import wandb

    if os.environ.get("WANDB_MODE") in _WITHOUT_LOGIN:
        return
    try:
        wandb.login()
    except Exception as error:
        raise UserError(
            f"logger.wandb cannot log in ({first_line(error)}). Run `wandb login` once, or give "
            "logger.wandb.offline=true: the run stays on this machine, and `wandb sync` uploads it later."
        ) from error
