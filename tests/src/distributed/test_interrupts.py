"""Ctrl-C as a request to stop: the first one, the second one, in workers and where no handler can be set."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import pytest

from src.distributed.interrupts import stop_on_interrupt


def test_the_second_interrupt_is_one():
    requests = []
    with stop_on_interrupt(lambda: requests.append(True)) as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert (requests, interrupted.is_set()) == ([True], True)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_forked_worker_ignores_the_interrupt():
    with stop_on_interrupt(lambda: os._exit(3)) as interrupted:
        process = multiprocessing.get_context("fork").Process(target=signal.raise_signal, args=(signal.SIGINT,))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        assert not interrupted.is_set()


def test_handlers_are_left_alone_where_they_cannot_be_set():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with stop_on_interrupt(lambda: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [before, signal.SIG_IGN]
