"""Handlers of signals: those that are replaced, those that stay, and work that a signal ends."""

import signal
import threading

import pytest

from src.utils.signals import signal_handlers, until_stopped


def test_signals_that_are_ignored_stay_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert until_stopped(lambda: signal.raise_signal(signal.SIGINT), lambda: "done") == "done"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_only_the_first_signal_counts():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    steps = []

    def work():
        signal.raise_signal(signal.SIGTERM)
        steps.append("never")

    def finish():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        return "saved"

    assert until_stopped(work, finish) == "saved"
    assert not steps
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_work_that_fails_has_no_result():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError):
        until_stopped(lambda: 1 / 0, lambda: "saved")
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_install_nothing():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with signal_handlers({signal.SIGTERM: signal.SIG_IGN}):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
