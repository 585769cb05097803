"""Ctrl-C and SIGTERM as requests to stop after the current step."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from scatterbrain.errors import UserError

logger = logging.getLogger(__name__)


def on_sigterm(request_stop: Callable[[], None]) -> None:
    """Let SIGTERM request a stop; in a trainer's hook this replaces Lightning's handler until the loop ends."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda signum, frame: request_stop())


@contextmanager
def stop_on_interrupt(request_stop: Callable[[], None], step: str = "update") -> Iterator[threading.Event]:
    """Let the first Ctrl-C request a stop; the second one interrupts as usual.

    Args:
        request_stop: called within a signal handler.
        step: what is finished before the stop, for the message.

    Yields:
        Whether there was one.
    """
    interrupted = threading.Event()
    # one of several processes ignores it, since the parent decides
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield interrupted
        return

    def handle(signum: int, frame: Any) -> None:
        if os.getpid() != process:  # a worker, forked with this handler
            return
        signal.signal(signal.SIGINT, previous)
        logger.warning("Stopping after this %s. Ctrl-C once more stops at once.", step)
        interrupted.set()
        request_stop()

    process = os.getpid()
    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def forward_to_children() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into SIGTERM for all processes that this one started, and wait for them to exit.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
    """

    def request_stop() -> None:
        for process in multiprocessing.active_children():
            process.terminate()

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGTERM)
    on_sigterm(request_stop)
    with stop_on_interrupt(request_stop) as interrupted:
        try:
            yield
        except UserError as error:  # they had nothing to save yet, or could not
            if not interrupted.is_set():
                raise
            logger.warning("%s", error)
        finally:
            if in_main_thread:
                signal.signal(signal.SIGTERM, previous)
    if interrupted.is_set():
        raise KeyboardInterrupt
