"""Functions that tests run in further processes, which import this file: it imports little."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from scatterbrain.errors import UserError


def report_rank(word: str) -> tuple[str, str, str, int]:
    return word, os.environ["LOCAL_RANK"], os.environ["MASTER_PORT"], torch.get_num_threads()


def fail_in_one(kind: str) -> None:
    """Rank 1 fails; rank 0 would wait for ever, or fails as a consequence."""
    if os.environ["LOCAL_RANK"] == "1":
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5 if kind == "late" else 0)
        raise (ZeroDivisionError("a bug") if kind == "bug" else UserError("image 7 is damaged."))
    if kind == "late":
        raise RuntimeError("connection closed by peer")
    time.sleep(600)


def train_in_turn(contents: list[dict[str, Any]], folder: Path) -> list[Any]:
    """Several trainings; their summaries, and in `folder` each process's final weights and losses of all batches."""
    import pytest
    from omegaconf import OmegaConf

    from src.distributed.trainer import build_trainer, quiet_libraries
    from src.tasks.classification_training import ClassificationTraining
    from src.tasks.train import _train
    from tests.src.tasks.conftest import make_tiny

    quiet_libraries()
    patch = pytest.MonkeyPatch()
    make_tiny(patch)
    step = ClassificationTraining.training_step
    losses = []

    def training_step(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        losses.append(float(loss))
        return loss

    patch.setattr(ClassificationTraining, "training_step", training_step)
    summaries = []
    for number, content in enumerate(contents):
        config = OmegaConf.create(content)
        losses.clear()
        summary, objects = _train(config, build_trainer(config))
        left = {"weights": objects.model.state_dict(), "losses": losses}
        torch.save(left, folder / f"{number}_{os.environ['LOCAL_RANK']}.pt")
        summaries.append(summary)
    return summaries


def evaluate_in_turn(contents: list[dict[str, Any]]) -> list[tuple[bool, int]]:
    """Several evaluations, of which rank 1 stops the first in its second batch; whether complete, of how many."""
    import pytest
    from omegaconf import OmegaConf

    from src.distributed.trainer import build_trainer, quiet_libraries
    from src.tasks.evaluate import evaluate_runs
    from tests.src.tasks.conftest import make_shallow
    from tests.src.tasks.setup import stop_evaluation_at

    quiet_libraries()
    make_shallow(pytest.MonkeyPatch())
    ends = []
    for number, content in enumerate(contents):
        with pytest.MonkeyPatch.context() as patch:
            if number == 0 and os.environ["LOCAL_RANK"] == "1":
                stop_evaluation_at(patch, 2, signal.SIGTERM)
            config = OmegaConf.create(content)
            (results,), _ = evaluate_runs(config, build_trainer(config))
        ends.append((results.complete, results.num_evaluated))
    return ends


def train_until_killed(content: dict[str, Any], number: int) -> None:
    """A training whose process is killed half way through its write of that number."""
    import pytest
    from omegaconf import OmegaConf

    from src.tasks.train import train
    from tests.src.tasks.conftest import make_tiny

    make_tiny(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    save = torch.save
    saves = []

    def half(saved, file):
        saves.append(file)
        if len(saves) == number:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(saved, file)

    torch.save = half
    train(OmegaConf.create(content))


def hold_folder(connection: Connection, folder: Path) -> None:
    """Hold an output folder until killed."""
    from src.distributed.folder_lock import locked_folder

    with locked_folder(folder):
        connection.send("held")
        time.sleep(600)
