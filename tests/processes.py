"""Processes for tests that are to start afresh: from a server that has imported the project, not changed by any test.

As with `spawn`, but without the five seconds of imports in each process.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import reduction
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

PRELOADED = ["src.tasks.evaluate", "src.tasks.train", "tests.src.tasks.conftest"]


class _Stream:
    """A file descriptor of this process, which a new process gets as a number of its own."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _detach, (reduction.DupFd(self.number),)


def _detach(duplicate: Any) -> int:
    return duplicate.detach()


class FreshProcess(ForkServerProcess):
    """Process with the environment and the output streams of the one that starts it, as with `spawn`."""

    def start(self) -> None:
        self.inherited = dict(os.environ), _Stream(1), _Stream(2)
        super().start()

    def run(self) -> None:
        environment, *streams = self.inherited
        os.environ.clear()
        os.environ.update(environment)
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
            os.close(stream)
        super().run()


class _FreshContext(ForkServerContext):
    Process = FreshProcess


def fresh_context(method: str | None = None) -> Any:
    """`multiprocessing.get_context` with such processes in place of those that are spawned.

    Args:
        method: as of `multiprocessing.get_context`.
    """
    if method != "spawn":
        return multiprocessing.context._default_context.get_context(method)
    context = _FreshContext()
    context.set_forkserver_preload(PRELOADED)
    return context
