"""One process per device on this machine, started and watched by a process that does no work of its own.

Lightning would start the command line again for every further device: within a multirun that starts the whole sweep
again, and where one process fails, the others are killed together with everything else in the sweep. Here each process
gets a function and its arguments, the first failure ends the others, and its message reaches the caller.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from scatterbrain.errors import UserError

# A process that fails takes its peers' collectives down with it: how long to wait for the one that knows why.
REASON_SECONDS = 5.0
EXIT_SECONDS = 30.0


class ProcessError(RuntimeError):
    """A process failed; the message is its traceback."""


@dataclass
class _Outcome:
    """What a process sends back: the value of the function, or its traceback and the message to the user if any."""

    value: Any = None
    traceback: str | None = None
    message: str | None = None


def run_processes(function: Callable[..., Any], num_processes: int, *arguments: Any) -> Any:
    """Call `function(*arguments)` in `num_processes` new processes that can form one process group.

    Each finds its rank in LOCAL_RANK and where to meet the others in MASTER_ADDR and MASTER_PORT, as Lightning and
    torch expect them, and has its share of the CPUs for its threads (unless OMP_NUM_THREADS is set).

    Args:
        function: a function of a module, not a closure.
        num_processes: at least 1.
        *arguments: what can be pickled.

    Returns:
        What the process of rank 0 returned.

    Raises:
        UserError: as raised in a process, the first to tell; a process was killed.
        ProcessError: anything else that a process raised.
    """
    context = multiprocessing.get_context("spawn")
    environment = {
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(_free_port()),
    }
    threads = max(1, torch.get_num_threads() // num_processes)
    processes, receivers = [], []
    try:
        for rank in range(num_processes):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_run, args=(sender, {**environment, "LOCAL_RANK": str(rank)}, threads, function, arguments)
            )
            process.start()
            sender.close()  # the process's own copy is then the last, and its end is seen here
            processes.append(process)
            receivers.append(receiver)
        value = _collect(receivers, processes)
        for process in processes:
            process.join(EXIT_SECONDS)
        return value
    finally:
        for process in processes:
            process.kill()  # not terminate: a process that waits for its peers handles no signals
            process.join()


def _collect(receivers: list[Any], processes: list[Any]) -> Any:
    """Value of rank 0 once every process has sent its outcome; the most telling failure is raised."""
    pending = dict(zip(receivers, range(len(receivers)), strict=True))
    values: dict[int, Any] = {}
    failure: ProcessError | None = None
    deadline = None
    while pending:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = multiprocessing.connection.wait(list(pending), timeout)
        if not ready:
            break
        for receiver in ready:
            rank = pending.pop(receiver)
            try:
                outcome = receiver.recv()
            except EOFError:
                raise UserError(_describe_end(rank, processes[rank])) from None
            if outcome.message is not None:
                raise UserError(outcome.message) from ProcessError(outcome.traceback)
            if outcome.traceback is None:
                values[rank] = outcome.value
            elif failure is None:
                failure = ProcessError(f"Process {rank} of {len(processes)} failed:\n{outcome.traceback}")
                deadline = time.monotonic() + REASON_SECONDS
    if failure is not None:
        raise failure
    return values[0]


def _describe_end(rank: int, process: Any) -> str:
    process.join(EXIT_SECONDS)
    code = process.exitcode
    how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit status {code}"
    return (
        f"Process {rank} ended {how} before its work was done, often for lack of memory. Lower "
        "datamodule.batch_size, datamodule.num_workers or trainer.devices."
    )


def _run(
    sender: Any, environment: dict[str, str], threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Body of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    try:
        outcome = _Outcome(value=function(*arguments))
    except UserError as error:
        outcome = _Outcome(message=str(error), traceback=traceback.format_exc())
    except Exception:
        outcome = _Outcome(traceback=traceback.format_exc())
    sender.send(outcome)
    logging.shutdown()


def _end_with_parent() -> None:
    """A process whose parent was killed must not go on holding a device."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
