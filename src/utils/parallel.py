"""One function on many arguments in parallel processes; failures are ignored."""

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
    on_done: Callable[[], None] = lambda: None,
    method: str = "spawn",
) -> None:
    """Call `work` on each case in other processes, for its side effects such as files or a cache on disk.

    Failing cases are ignored, also those that crash their process; the remaining cases go to the other processes. All
    processes end before the call returns or raises.

    Args:
        work: picklable, as the cases are; its result is ignored.
        cases: started in this order.
        jobs: largest number of processes.
        on_done: called in this process after each case.
        method: start method. A process forked from one that uses CUDA cannot use CUDA.
    """
    context = multiprocessing.get_context(method)
    waiting = deque(cases)
    processes = []
    connections: list[Connection] = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    try:
        # Inherited by the processes: Ctrl-C in a terminal reaches them too, and each would print a traceback.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
        try:
            for _ in range(min(jobs, len(cases))):
                connection, other_end = context.Pipe()
                processes.append(context.Process(target=_serve, args=(other_end, work), daemon=True))
                processes[-1].start()
                other_end.close()  # or the exit of the process would not be detected
                connections.append(connection)
                with contextlib.suppress(OSError):  # the process has already exited: handled below
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
                except (EOFError, OSError):  # the process has exited
                    connections.remove(connection)
                on_done()
    finally:
        for process in processes:
            if process.pid is not None:  # it was started
                process.terminate()
                process.join()
                process.close()


def _serve(connection: Connection, work: Callable[[T], object]) -> None:
    """Main function of a process: runs one case after another until the connection closes."""
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        # the caller repeats the work of a failed case itself, and reports its error
        with contextlib.suppress(Exception):
            work(case)
        connection.send(None)
