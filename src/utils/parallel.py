"""One function on many arguments, in processes that may fail."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import TypeVar

T = TypeVar("T")


def run_in_processes(
    work: Callable[[T], object],
    cases: Sequence[T],
    jobs: int,
    tell: Callable[[], None] = lambda: None,
    method: str = "spawn",
) -> None:
    """Call `work` on each case, in other processes, for what it leaves outside of them: files, a cache on disk.

    A case that fails is ignored, one that takes its process down too; cases that are left go to the other processes.
    No process outlives the call, whatever ends it.

    Args:
        work: can be pickled, as the cases can; what it returns is dropped.
        cases: begun in this order.
        jobs: number of processes at most.
        tell: called here after each case.
        method: how processes start. A process forked from one that uses CUDA cannot use it.
    """
    context = multiprocessing.get_context(method)
    waiting = deque(cases)
    processes = []
    connections: list[Connection] = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    try:
        # They inherit it: Ctrl-C on a terminal reaches them too, and would be told of by each of them.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
        try:
            for _ in range(min(jobs, len(cases))):
                connection, other_end = context.Pipe()
                processes.append(context.Process(target=_serve, args=(other_end, work), daemon=True))
                processes[-1].start()
                other_end.close()  # or the end of the process would not be seen
                connections.append(connection)
                with contextlib.suppress(OSError):  # the process is gone already: seen below
                    connection.send(waiting.popleft())
        finally:
            if in_main_thread:
                signal.signal(signal.SIGINT, interrupt)
        while connections:
            for connection in wait(connections):
                try:
                    connection.recv()
                    if waiting:
                        connection.send(waiting.popleft())
                    else:
                        connections.remove(connection)
                except (EOFError, OSError):  # the process is gone
                    connections.remove(connection)
                tell()
    finally:
        for process in processes:
            if process.pid is not None:  # it was started
                process.terminate()
                process.join()
                process.close()


def _serve(connection: Connection, work: Callable[[T], object]) -> None:
    """What a process does: one case after another, until no other comes."""
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        # whoever needs what the case would have left meets the fault again, and tells of it
        with contextlib.suppress(Exception):
            work(case)
        connection.send(None)
