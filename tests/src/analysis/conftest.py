"""Checkpoints, which the tests of the tasks have too."""

from tests.src.tasks.conftest import checkpoints, shallow

__all__ = ["checkpoints", "shallow"]
