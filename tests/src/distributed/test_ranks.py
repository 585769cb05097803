"""Ranks that torchrun or SLURM started: one result, one log, abort on first failure; and jobs of a Hydra launcher."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import run
from scatterbrain.errors import UserError
from src.distributed import ranks
from src.distributed.failed_jobs import ERROR_FILE, FailedJobs
from src.distributed.launcher import Launch
from src.tasks.evaluate import evaluate
from tests.src.tasks.setup import (
    assert_same_evaluation,
    compose_config,
    make_checkpoint,
    make_images,
    overrides,
)

ROOT = Path(__file__).parents[3]
NUM_IMAGES = 9


# Joining, failing and leaving

PROGRAM = """
import os, signal, sys, time
from src.distributed import ranks
from src.utils.cli import report
from scatterbrain.errors import UserError

kind = sys.argv[1]
ranks.GRACE_SECONDS, ranks.ARRIVAL_SECONDS = 0.5, 1.5 if kind == "missing" else 60.0
ranks.NOTICE_SECONDS = 0.5 if kind == "missing" else 60.0


def work(processes):
    processes.barrier("begun")
    print(processes.broadcast("folder", f"/{processes.rank}"), flush=True)
    if kind == "failure" and processes.rank == 1:
        raise UserError("image 7 is damaged.")
    if kind == "bug":
        if processes.rank == 1:
            time.sleep(0.5)
            raise UserError("image 7 is damaged.")
        raise RuntimeError("Connection closed by peer")  # rank 1 has the reason
    if kind == "killed" and processes.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "late" and processes.rank == 1:
        time.sleep(1)
        raise UserError("image 8 is damaged.")
    if kind in ("failure", "killed"):
        processes.barrier("never")


try:
    with ranks.join_ranks() as processes:
        try:
            processes.call(lambda: work(processes))
        except UserError as error:
            report(error)
            raise SystemExit(1)
except UserError as error:
    report(error)
    raise SystemExit(1)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def slurm_tasks(command: list[str], number: int, started: int | None = None) -> list[subprocess.Popen]:
    """The processes of `srun --ntasks=number command`, or the first `started` of them."""
    port = free_port()
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                **os.environ,
                **{"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "test", "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0"},
                **{"SLURM_NTASKS": str(number), "SLURM_NTASKS_PER_NODE": str(number), "SLURM_NNODES": "1"},
                **{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
                "PYTHONPATH": str(ROOT),
            },
        )
        for rank in range(number if started is None else started)
    ]


def ends_of(processes: list[subprocess.Popen]) -> tuple[list[int], list[str], list[str]]:
    """Exit statuses, outputs and what each said on stderr about errors."""
    ends = [process.communicate(timeout=120) for process in processes]
    errors = ["".join(re.findall(r"^Error.*\n", errors, re.MULTILINE)) for _, errors in ends]
    return [process.returncode for process in processes], [output for output, _ in ends], errors


def run_program(kind: str, number: int = 2, **options: int) -> tuple[list[int], list[str], list[str]]:
    return ends_of(slurm_tasks([sys.executable, "-c", PROGRAM, kind], number, **options))


def test_a_failure_is_reported_once_and_aborts_all():
    begin = time.monotonic()
    statuses, outputs, errors = run_program("failure")
    assert (statuses, errors) == ([1, 1], ["", "Error: image 7 is damaged.\n"])
    assert outputs == ["/0\n", "/0\n"]  # all agree with the first
    assert time.monotonic() - begin < 60  # no rank waits for those that have exited


def test_a_finished_rank_fails_with_the_others():
    assert run_program("late")[::2] == ([1, 1], ["", "Error: image 8 is damaged.\n"])


def test_the_rank_with_the_reason_reports():
    assert run_program("bug")[::2] == ([1, 1], ["", "Error: image 7 is damaged.\n"])


def test_rank_0_is_killed():
    statuses, _, errors = run_program("killed")
    assert statuses == [-signal.SIGKILL, 1]
    assert errors[0] == ""
    assert errors[1].startswith("Error: Process 0 ended before its work was done, often for lack of memory. Lower")


def test_a_rank_that_never_arrives():
    (process,) = slurm_tasks([sys.executable, "-c", PROGRAM, "missing"], 2, started=1)
    notice, error = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 1
    assert notice == "Waiting for 1 of 2 processes. Giving up 2 s after the start."
    assert error.startswith("Error: 1 of 2 processes have arrived after 2 s. Start all of them")


def test_an_address_that_does_not_answer(monkeypatch, capfd):
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(ranks, "ARRIVAL_SECONDS", 2.0)
    monkeypatch.setattr(ranks, "NOTICE_SECONDS", 0.3)
    with pytest.raises(UserError, match=rf"Process 1 of 2 cannot reach the others at 127.0.0.1:{port}"):
        ranks._open_store(Launch("torchrun", 1, 2, 1))
    notice = f"Process 1 of 2 waits for process 0 at MASTER_ADDR:MASTER_PORT=127.0.0.1:{port}. Giving up 2 s after"
    assert notice in capfd.readouterr().err


# The command


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_images(folder / "data", NUM_IMAGES)
    make_checkpoint(folder / "weights.pth", "t2t_vit_7")
    return folder


def options_of(inputs: Path, **changes: object) -> list[str]:
    return overrides(inputs / "data", inputs / "weights.pth", "t2t_vit_7", datamodule__batch_size=1, **changes)


@pytest.fixture(scope="module")
def alone(inputs) -> Path:
    """The evaluation of a single process."""
    evaluate(compose_config(options_of(inputs), inputs / "alone"))
    return inputs / "alone"


def assert_that_of_one_process(folder: Path, alone: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    expected = json.loads((alone / "results.json").read_text())
    for name in ("device", "images_per_second", "seconds", "command"):
        del results[name], expected[name]
    assert results == expected
    assert (folder / "predictions.csv").read_bytes() == (alone / "predictions.csv").read_bytes()


def test_torchrun(inputs, alone, tmp_path):
    end = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"),
            *("run.py", "trainer=torchrun", *options_of(inputs, hydra__run__dir=tmp_path / "run")),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert end.returncode == 0, end.stderr
    assert end.stdout.count("9 images of val") == 1
    assert_that_of_one_process(tmp_path / "run", alone)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["device"].startswith("2 x cpu")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *(".hydra", "csv", "predictions.csv", "results.json", "run.log"),
    ]


def test_slurm(inputs, alone, tmp_path):
    command = [sys.executable, "run.py", "trainer=slurm", *options_of(inputs, hydra__run__dir=tmp_path / "run")]
    statuses, outputs, errors = ends_of(slurm_tasks(command, 2))
    assert (statuses, errors) == ([0] * 2, [""] * 2)
    assert "9 images of val" in outputs[0]
    assert outputs[1] == ""
    assert_that_of_one_process(tmp_path / "run", alone)


def test_an_error_is_reported_once(inputs, tmp_path):
    command = [sys.executable, "run.py", "trainer=slurm", *options_of(inputs, eval__ckpt=tmp_path / "no.pth")]
    statuses, _, errors = ends_of(slurm_tasks([*command, f"hydra.run.dir={tmp_path / 'run'}"], 2))
    assert statuses == [1, 1]
    assert "".join(errors).count("Error") == 1
    assert f"Checkpoint {tmp_path / 'no.pth'} does not exist." in "".join(errors)


def test_a_multirun_of_several_processes_is_refused(inputs, tmp_path):
    command = [sys.executable, "run.py", "-m", "trainer=slurm", *options_of(inputs)]
    statuses, _, errors = ends_of(slurm_tasks([*command, f"hydra.sweep.dir={tmp_path / 'sweep'}"], 2))
    assert statuses == [1, 1]
    assert "".join(errors).startswith("Error: A multirun cannot be one of several processes that a launcher started.")
    assert "".join(errors).count("Error") == 1


# Jobs that a launcher of Hydra's ran


def test_errors_of_failed_jobs_are_reported(tmp_path, capsys):
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / ERROR_FILE).write_text("Checkpoint x does not exist.\n")
    callback, config = FailedJobs(), OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    callback.on_multirun_end(config)
    assert capsys.readouterr().err == f"Error in {tmp_path / '1'}: Checkpoint x does not exist.\n"
    assert len(FailedJobs.messages) == 1
    (tmp_path / "1" / ERROR_FILE).unlink()
    callback.on_multirun_end(config)
    assert FailedJobs.messages == ()


needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None
    if importlib.util.find_spec("hydra_plugins")
    else True,
    reason="hydra-submitit-launcher is not installed (an option)",
)


@pytest.mark.skipif(importlib.util.find_spec("submitit") is not None, reason="hydra-submitit-launcher is installed")
def test_without_the_launcher_of_slurm(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOG_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["run.py", "-m", "hydra/launcher=slurm", *options_of(inputs)])
    assert run.run(sys.argv) == 1
    assert "pip install hydra-submitit-launcher" in capsys.readouterr().err


@needs_submitit
def test_jobs_of_a_sweep(inputs, alone, tmp_path):
    """One that works and one that fails, each run by submitit in a process of its own."""
    command = [
        *(sys.executable, "run.py", "-m", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"),
        *(f"hydra.sweep.dir={tmp_path / 'sweep'}", *options_of(inputs, model__image_size="32,100")),
    ]
    end = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert end.returncode == 1
    (error,) = re.findall(r"^Error.*", end.stderr, re.MULTILINE)
    assert error.startswith(f"Error in {tmp_path / 'sweep' / '1'}: ")
    assert "image_size=100" in error
    assert_same_evaluation(tmp_path / "sweep" / "0", alone)
    assert (tmp_path / "sweep" / "comparison.json").exists()


@needs_submitit
def test_the_jobs_of_slurm_have_a_task_for_each_device():
    from hydra import compose, initialize_config_dir

    from tests.src.tasks.setup import CONFIG_DIR

    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        options = ["hydra/launcher=slurm", "trainer=slurm", "trainer.devices=8", "trainer.num_nodes=2"]
        launcher = compose("config", options, return_hydra_config=True).hydra.launcher
        assert launcher._target_.endswith("SlurmLauncher")
        assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (2, 8, 8)
