"""Ctrl-C (SIGINT) and SIGTERM, with which batch systems stop, during a piece of work."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def signal_handlers(handlers: Mapping[int, Callable[[int, Any], Any]]) -> Iterator[None]:
    """Context with other handlers of signals.

    Signals that are ignored stay so, as nohup and background jobs of a shell want it, and so do handlers that were not
    installed from Python. Outside the main thread, which alone can install handlers, none is.
    """
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def until_stopped(work: Callable[[], None], then: Callable[[], T]) -> T:
    """What `then` returns, after work that is done, or stopped by Ctrl-C or by SIGTERM.

    Only the first of the signals counts: they are often sent twice, and `then` saves what there is. It does not follow
    where `work` fails.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)

    def ignore() -> None:
        for number in numbers:
            if signal.getsignal(number) is stop:
                signal.signal(number, signal.SIG_IGN)

    def stop(*_: object) -> None:
        ignore()
        raise KeyboardInterrupt

    with signal_handlers(dict.fromkeys(numbers, stop)):
        with contextlib.suppress(KeyboardInterrupt):
            work()
            ignore()
        return then()
