"""How a process was started, by the variables of torchrun and SLURM, and the trainer that follows from it."""

from __future__ import annotations

import re

import pytest

from scatterbrain.errors import UserError
from src.distributed.launcher import Launch, find_launch
from src.distributed.trainer import build_trainer
from tests.src.tasks.setup import compose_config

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "evaluate"}


@pytest.mark.parametrize(
    ("variables", "launch"),
    [
        ({}, None),
        (TORCHRUN, Launch("torchrun", 3, 4, 2)),
        (SLURM, Launch("SLURM", 1, 4, 2)),
        (SLURM | TORCHRUN, Launch("torchrun", 3, 4, 2)),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (SLURM | {"SLURM_JOB_NAME": "interactive"}, None),
    ],
    ids=["alone", "torchrun", "srun", "srun torchrun", "one task", "interactive"],
)
def test_how_a_process_was_started(monkeypatch, variables, launch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_launch() == launch
    if launch is not None:
        assert launch.per_node == 2


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({name: value for name, value in TORCHRUN.items() if name != "RANK"}, "The variable RANK is not set."),
        (SLURM | {"SLURM_PROCID": "first"}, "'first'"),
        (SLURM | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4 and SLURM_NTASKS=4 of SLURM do not fit"),
        (TORCHRUN | {"RANK": "5"}, "RANK=5 and WORLD_SIZE=4 of torchrun do not fit"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT='abc' is not a whole number"),
    ],
)
def test_variables_that_are_not_valid(monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        find_launch()


def test_machines_with_different_numbers_of_processes():
    with pytest.raises(UserError, match=r"torchrun started 3 processes on 2 machines\. Start the same number on each"):
        _ = Launch("torchrun", 0, 3, 2).per_node


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["trainer.devices=1"], "trainer.devices=4 trainer.num_nodes=1, or trainer=slurm,"),
        (["trainer.devices=4", "trainer.num_nodes=2"], "trainer.devices=4 trainer.num_nodes=1, or trainer=slurm,"),
    ],
)
def test_another_number_of_devices(monkeypatch, tmp_path, options, advice):
    for name, value in (SLURM | {"SLURM_NNODES": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"SLURM started 4 process.*{re.escape(advice)}"):
        build_trainer(compose_config(["trainer.accelerator=cpu", *options], tmp_path))


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("torchrun", {"LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "3"}),
        ("slurm", {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "3"}),
    ],
)
def test_trainers_take_their_sizes_from_the_launcher(monkeypatch, name, variables):
    trainer = compose_config([f"trainer={name}"]).trainer
    assert (trainer.devices, trainer.num_nodes) == (1, 1)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    trainer = compose_config([f"trainer={name}"]).trainer
    assert (trainer.devices, trainer.num_nodes) == (2, 3)
