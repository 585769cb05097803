"""Checkpoints of a training: atomic writes, reads that execute no code, and all that a resumed training needs."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import shutil
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from scatterbrain.errors import UserError, is_number
from src.checkpoints import save_checkpoint
from src.distributed.interrupts import on_sigterm
from src.tasks.classification_training import CHECKPOINT_KEY, not_finite
from src.utils.files import atomic_write

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last.ckpt"
BEST_CHECKPOINT = "best.ckpt"
# Entry of a training checkpoint with the checksum of all other entries.
CHECKSUM_KEY = "checksum"

_CONTINUE, _SAVE, _TIME_IS_UP, _STOP_REQUESTED = range(4)


class TrainingStopped(Exception):  # noqa: N818 - like StopIteration, not an error
    """The training was stopped before its end; the checkpoint to resume from is on the disk."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's input and output of checkpoints, with atomic writes and without executing code in them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint with its checksum, under its name once it is complete.

        Raises:
            UserError: it cannot be written, for example because the disk is full; or weights or averaged weights are
                not finite.
        """
        _check_finite_weights(checkpoint)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint({**checkpoint, CHECKSUM_KEY: content_checksum(checkpoint)}, path)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            UserError: the file is missing, damaged, or holds more than tensors and plain types.
        """
        return read_training_checkpoint(path, map_location)


def read_training_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint to resume from.

    Raises:
        UserError: the file is missing, damaged, edited, or no such checkpoint.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        special = path.exists() and not path.is_dir()
        fault = f"{path} is not a regular file" if special else f"There is no checkpoint {path}"
        raise UserError(f"{fault}. Give train.resume the file {LAST_CHECKPOINT} of a training.")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on damaged input
        fault = "holds code, which was not run" if isinstance(error, pickle.UnpicklingError) else "is damaged"
        raise UserError(f"{path} {fault}, or is no checkpoint. Resume from another one, or start again.") from error
    if not isinstance(checkpoint, dict) or not {"loops", "optimizer_states", CHECKPOINT_KEY} <= checkpoint.keys():
        raise UserError(
            f"{path} is no checkpoint of a training by this project, so it cannot be resumed. For weights alone, "
            f"give train.ckpt={path}."
        )
    stored = checkpoint.pop(CHECKSUM_KEY, None)
    try:
        intact = stored == content_checksum(checkpoint)
    except Exception:  # damaged content can raise anything
        intact = False
    if not intact:
        raise UserError(
            f"{path} is damaged or was edited: its content is not that of its checksum. Resume from another one, or "
            f"start again from its weights with train.ckpt={path}."
        )
    return checkpoint


def content_checksum(content: Any) -> str:
    """SHA-256 of nested dicts, lists, tuples, sets, tensors and plain values, whatever the file that holds them.

    Raises:
        TypeError: a tensor that is not dense.
    """
    digest = hashlib.sha256()
    _hash_into(digest, content)
    return digest.hexdigest()


def _hash_into(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_nested:
            raise TypeError(f"a tensor of layout {value.layout}")
        value = value.detach()
        digest.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            # a view that repeats elements: its shape may be too large for the memory
            digest.update(f"{value.stride()} ".encode())
            value = torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.untyped_storage())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        digest.update(f"dict {len(value)} ".encode())
        for key, item in value.items():
            digest.update(f"{key!r} ".encode(errors="surrogatepass"))
            _hash_into(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"{'list' if isinstance(value, list) else 'tuple'} {len(value)} ".encode())
        for item in value:
            _hash_into(digest, item)
    elif isinstance(value, set):  # its order differs between processes
        digest.update(f"set {sorted(map(repr, value))} ".encode(errors="surrogatepass"))
    else:
        digest.update(f"{value!r} ".encode(errors="surrogatepass"))


def _check_finite_weights(checkpoint: Mapping[str, Any]) -> None:
    """Raise a UserError unless the weights and the averaged weights of a checkpoint are finite."""
    averaged = "current_model_state" in checkpoint  # the averages are under `state_dict` then
    states = {"averaged weights" if averaged else "weights": checkpoint["state_dict"]}
    if averaged:
        states = {"weights": checkpoint["current_model_state"], **states}
    for kind, state in states.items():
        for key, tensor in state.items():
            if not torch.isfinite(tensor).all():
                raise not_finite(f"The {kind} became NaN or infinite ('{key}')", checkpoint["global_step"])


class BestCheckpoint(Checkpoint):
    """Keeps `best.ckpt`, of the first of the epochs with the best validation result.

    It is found by the history of the training, which a resumed one continues in any folder.

    Args:
        dirpath: folder of the checkpoint.
    """

    def __init__(self, dirpath: str) -> None:
        self.path = Path(dirpath) / BEST_CHECKPOINT

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Copy the best checkpoint where the training resumes in another folder."""
        best = Path(trainer.ckpt_path).with_name(BEST_CHECKPOINT)
        if trainer.is_global_zero and best.is_file() and not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(best, "rb") as source, atomic_write(self.path, "wb") as target:
                shutil.copyfileobj(source, target)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the epoch if it is the best one so far."""
        if pl_module.last_is_best:
            trainer.save_checkpoint(self.path)


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`, from which an interrupted training resumes exactly.

    It is written at the end of each epoch, within an epoch every `minutes_between`, and when the training stops before
    its end: because its time is up, or by Ctrl-C or SIGTERM, in each case after the current update. Without
    `every_epoch`, the end of an epoch is like any other update, but for the last one.

    Args:
        dirpath: folder of the checkpoint.
        minutes_between: minutes between two checkpoints within an epoch.
        max_time: hours, minutes and seconds as "HH:MM:SS" after which the training stops; None for no limit.
        every_epoch: write it at the end of each epoch.

    Raises:
        UserError: a time that is not valid.
    """

    def __init__(
        self, dirpath: str, minutes_between: float = 15, max_time: str | None = None, every_epoch: bool = True
    ) -> None:
        if not is_number(minutes_between) or minutes_between <= 0:
            raise UserError(f"callbacks.last.minutes_between={minutes_between!r} is not valid. Give minutes above 0.")
        self.path = Path(dirpath) / LAST_CHECKPOINT
        self._seconds_between = 60 * minutes_between
        self._max_time = None if max_time is None else _parse_time(max_time)
        self._every_epoch = every_epoch
        self._stop_requested = threading.Event()

    def request_stop(self) -> None:
        """Stop after the current update; safe to call from a signal handler."""
        self._stop_requested.set()

    @property
    def stop_requested(self) -> bool:
        """Whether a signal requested a stop."""
        return self._stop_requested.is_set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks, and let SIGTERM request a stop."""
        self._started = self._saved = time.monotonic()
        # Lightning's handler would exit at once while gradients wait for an update, and after the last epoch
        on_sigterm(self.request_stop)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, or save and stop, when it is time.

        Raises:
            TrainingStopped: the training is to stop.
        """
        # gradients that wait for an update are in no checkpoint, and the end of an epoch saves by itself
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        action = self._next_action(trainer)
        if action != _CONTINUE:
            self._save(trainer)
        self._stop_after(action, trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save; stop when it is time.

        Raises:
            TrainingStopped: the training is to stop, and not at its end anyway.
        """
        is_last, action = trainer.current_epoch + 1 == trainer.max_epochs, self._next_action(trainer)
        if self._every_epoch or is_last or action != _CONTINUE:
            self._save(trainer)
        if not is_last:
            self._stop_after(action, trainer)

    def _next_action(self, trainer: Trainer) -> int:
        now, action = time.monotonic(), _CONTINUE
        if now - self._saved > self._seconds_between:
            action = _SAVE
        if self._max_time is not None and now - self._started > self._max_time:
            action = _TIME_IS_UP
        if self._stop_requested.is_set():
            action = _STOP_REQUESTED
        if trainer.world_size > 1:  # all ranks take the most urgent action of any of them
            together = torch.tensor(float(action), device=trainer.strategy.root_device)
            action = int(trainer.strategy.reduce(together, reduce_op="max"))
        return action

    def _stop_after(self, action: int, trainer: Trainer) -> None:
        if action in (_TIME_IS_UP, _STOP_REQUESTED):
            reason = "because its time is up" if action == _TIME_IS_UP else "on request"
            raise TrainingStopped(
                f"The training stopped after {trainer.global_step:,} updates {reason}. The same command with "
                f"{self._resume_option()} resumes it."
            )

    def _resume_option(self) -> str:
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            # the trainings of a multirun have a checkpoint each
            return f"train.resume=true hydra.sweep.dir={Path(HydraConfig.get().sweep.dir).absolute()}"
        return f"train.resume={self.path}"

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved = time.monotonic()


def _parse_time(text: str) -> float:
    """Seconds of "HH:MM:SS"."""
    parts = str(text).split(":")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise UserError(f"train.max_time={text} is not valid. Give hours, minutes and seconds: train.max_time=12:30:00")
    hours, minutes, seconds = map(int, parts)
    return timedelta(hours=hours, minutes=minutes, seconds=seconds).total_seconds()
