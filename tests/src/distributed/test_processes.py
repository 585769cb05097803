"""`run_processes`: the value of rank 0, and a failure in one process that aborts all with its reason."""

from __future__ import annotations

import os
import time

import pytest
import torch

from scatterbrain.errors import UserError
from src.distributed.processes import ProcessError, run_processes
from tests.src.distributed.process_functions import fail_in_one, report_rank


def test_rank_0_answers_and_the_environment_stays_as_it_was():
    before = dict(os.environ)
    word, rank, port, threads = run_processes(report_rank, 2, "hello")
    assert (word, rank, threads) == ("hello", "0", max(1, torch.get_num_threads() // 2))
    assert port.isdigit()
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("user", UserError, "^image 7 is damaged.$"),
        ("late", UserError, "^image 7 is damaged.$"),
        ("killed", UserError, "Process 1 ended by SIGKILL .*Lower"),
        ("bug", ProcessError, "Process 1 of 2 failed:(.|\n)*fail_in_one(.|\n)*ZeroDivisionError: a bug"),
    ],
)
def test_one_failure_ends_all(kind, error, message):
    started = time.monotonic()
    with pytest.raises(error, match=message):
        run_processes(fail_in_one, 2, kind)
    assert time.monotonic() - started < 60
