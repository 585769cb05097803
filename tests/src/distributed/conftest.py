"""An environment without the variables of torchrun and SLURM."""

from __future__ import annotations

import os
import re

import pytest

from tests.processes import fresh_context

# of torchrun and SLURM, in the environment that the tests run in
FOREIGN = re.compile("SLURM_|TORCHELASTIC_|(RANK|LOCAL_RANK|WORLD_SIZE|GROUP_WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$")


@pytest.fixture(autouse=True)
def fresh_processes(monkeypatch):
    """Processes that start afresh come from a server."""
    monkeypatch.setattr("multiprocessing.get_context", fresh_context)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in filter(FOREIGN.match, list(os.environ)):
        monkeypatch.delenv(name)
