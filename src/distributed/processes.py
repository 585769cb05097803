"""Starts one process per device on this machine and collects their results; the first failure ends all of them.

Lightning would start the command line again for every further device: in a multirun that starts the whole sweep again,
and a failure in one process kills the sweep. Here each process gets a function and its arguments.
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
from src.distributed.timeouts import EXIT_SECONDS, REASON_SECONDS


class ProcessError(RuntimeError):
    """A process failed; the message is its traceback."""


@dataclass
class _Outcome:
    """Result of a process: the value of the function, or its traceback and the message to the user if any."""

    value: Any = None
    traceback: str | None = None
    message: str | None = None


def run_processes(function: Callable[..., Any], num_processes: int, *arguments: Any) -> Any:
    """What `function(*arguments)` returns in rank 0 of `num_processes` new processes that can form a process group.

    LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set as Lightning and torch expect them. The threads of this process are
    shared out (unless OMP_NUM_THREADS is set).

    Args:
        function: a function of a module, not a closure.
        num_processes: at least 1.
        *arguments: what can be pickled.

    Returns:
        What the process of rank 0 returned.

    Raises:
        UserError: the first that a process raised; a process was killed.
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
            sender.close()  # the process then holds the only copy, so its exit shows as end of file
            processes.append(process)
            receivers.append(receiver)
        value = _collect(receivers, processes)
        for process in processes:
            process.join(EXIT_SECONDS)
        return value
    finally:
        for process in processes:
            process.kill()  # not terminate: a process blocked in a collective handles no signals
            process.join()


def _collect(receivers: list[Any], processes: list[Any]) -> Any:
    """Value of rank 0 once every process has sent its outcome; an error of the user's is raised before any other."""
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
                raise UserError(_exit_message(rank, processes[rank])) from None
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


def _exit_message(rank: int, process: Any) -> str:
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
    threading.Thread(target=_exit_with_parent, daemon=True).start()
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


def _exit_with_parent() -> None:
    """Exit when the parent is killed, so that no orphan holds a device."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
