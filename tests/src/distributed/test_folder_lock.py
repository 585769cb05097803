"""The lock of an output folder: one run at a time, none after a kill, and the temporary files it left."""

from __future__ import annotations

import multiprocessing
import os
import re

import pytest

from scatterbrain.errors import UserError
from src.distributed.folder_lock import locked_folder
from src.tasks.evaluate import evaluate
from src.tasks.train import train
from tests.src.distributed.process_functions import hold_folder
from tests.src.tasks.setup import compose_config


@pytest.fixture
def holder(tmp_path):
    """A process that holds `tmp_path`."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold_folder, args=(theirs, tmp_path))
    process.start()
    assert ours.recv() == "held"
    yield process
    process.kill()
    process.join()


def test_another_run_is_named(holder, tmp_path):
    message = f"{tmp_path} is in use by another run: process {holder.pid} on .* since 20.*, .*choose another"
    with pytest.raises(UserError, match=message), locked_folder(tmp_path):
        pass
    holder.kill()
    holder.join()
    assert (tmp_path / ".lock").exists()
    with locked_folder(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("work", [evaluate, train])
def test_runs_hold_their_folder(tmp_path, work):
    experiment = {"evaluate": "flowers-t2tvit-eval", "train": "imagenet-t2tvit-train"}[work.__name__]
    config = compose_config([f"experiment={experiment}", "datamodule.data_dir=no"], tmp_path / "run")
    with locked_folder(tmp_path / "run"), pytest.raises(UserError, match="is in use by another run"):
        work(config)
    with pytest.raises(UserError, match="no does not exist"):
        work(config)
    assert not list((tmp_path / "run").iterdir())


def test_only_rank_0_locks(monkeypatch, tmp_path):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with locked_folder(tmp_path):
        assert not list(tmp_path.iterdir())


def test_temporary_files_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "0").mkdir()
    for name in (".results.json.0123456789ab.tmp", "0/.predictions.csv.abcdefabcdef.tmp", "notes.tmp", ".x.tmp"):
        (tmp_path / name).touch()
    with locked_folder(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [".x.tmp", "notes.tmp"]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            UserError, match=re.escape(f"{tmp_path / 'file' / 'run'} cannot be written to (Not a directory)")
        ),
        locked_folder(tmp_path / "file" / "run"),
    ):
        pass
