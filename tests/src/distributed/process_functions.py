"""Functions that tests run in further processes, which import this file: it imports little."""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import signal
import sys
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


def kill_at_each_write(mode: str, content: dict[str, Any], killed: Path) -> None:
    """An evaluation or a training whose end is repeated, each time killed at another of its changes of files.

    Forks do that: a fork's folder goes to `killed` / number, and the next one begins with that of before. What is left
    is a file just created, a temporary one before it is renamed, or one that is about to be removed.
    """
    import pytest
    from matplotlib.figure import Figure
    from omegaconf import OmegaConf

    from tests.src.tasks.conftest import make_shallow, make_tiny

    patch = pytest.MonkeyPatch()
    for figure in ("comparison_files.comparison_figure", "training_summary.training_figure"):
        patch.setattr(f"src.evaluation.{figure}", lambda content: Figure(figsize=(1, 1)))
    make_shallow(patch)
    make_tiny(patch)
    torch.set_num_threads(1)
    module = importlib.import_module(f"src.tasks.{mode}")
    writer = {"evaluate": "write_runs", "train": "write_training"}[mode]
    write_files = getattr(module, writer)
    config = OmegaConf.create(content)
    folder = Path(config.paths.output_dir)
    before = folder.with_name("before")

    def write_in_forks(*arguments: Any) -> None:
        shutil.copytree(folder, before)
        for number in itertools.count():
            process = os.fork()
            if process == 0:
                sys.addaudithook(Killer(folder, number))
                return write_files(*arguments)
            _, status = os.waitpid(process, 0)
            if os.WIFEXITED(status):
                os._exit(os.WEXITSTATUS(status))
            folder.rename(killed / str(number))
            shutil.copytree(before, folder)

    patch.setattr(module, writer, write_in_forks)
    getattr(module, mode)(config)
    os._exit(0)


class Killer:
    """An audit hook that kills the process at its change number `number` of the files in a folder."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.left = str(folder), number

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.rmdir"):
            return
        path = arguments[0]
        if not isinstance(path, str | os.PathLike):
            return
        path = os.fspath(path)
        opens = event == "open"
        if opens and not (arguments[2] & (os.O_WRONLY | os.O_RDWR) and arguments[2] & os.O_CREAT):
            return
        # the files of a tree are removed by their names within its folders
        if not (path.startswith(self.folder) or (not opens and not os.path.isabs(path))):
            return
        self.left -= 1
        if self.left == -1:
            if opens:
                os.close(os.open(path, arguments[2], 0o666))
            os.kill(os.getpid(), signal.SIGKILL)
