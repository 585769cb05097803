"""Hydra within the process of the tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig


@contextmanager
def hydra_restored() -> Iterator[None]:
    """Leave Hydra's configuration and the log handlers as they were before a `hydra.main` in this process."""
    root = logging.getLogger()
    handlers, level, hydra_config = root.handlers[:], root.level, HydraConfig.instance().cfg
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level  # Hydra's hold the stdout of one test
        HydraConfig.instance().cfg = hydra_config
