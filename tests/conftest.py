"""Fixtures of all tests."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. It is chosen when a kernel is defined, so this comes
# before the first import of one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from tests import interpreter

    interpreter.speed_up()

from tests.helpers import load_golden


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Most tensors here are tiny: threads cost more than they give, many times more on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, alone or after others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden():
    """Loader of stored reference outputs: `golden(name)` gives the entries of `golden/<name>.npz`, read once."""
    loaded: dict[str, dict[str, np.ndarray]] = {}

    def load(name: str) -> dict[str, np.ndarray]:
        if name not in loaded:
            loaded[name] = load_golden(name)
        return loaded[name]

    return load
