"""`run_processes`: the value of rank 0, and a failure in one process that aborts all with its reason."""

from __future__ import annotations

import os
import time

import pytest
import torch
from omegaconf import OmegaConf

from scatterbrain.errors import UserError
from src.distributed import launch
from src.distributed.processes import ProcessError, run_processes
from tests.src.distributed.process_functions import fail_in_one, report_rank
from tests.src.tasks.setup import compose_config


def test_rank_0_answers_and_the_environment_stays_as_it_was():
    before = dict(os.environ)
    word, rank, port, threads = run_processes(report_rank, 2, "hello")
    assert (word, rank, threads) == ("hello", "0", max(1, torch.get_num_threads() // 2))
    assert port.isdigit()
    assert dict(os.environ) == before


def test_values_of_a_configuration_are_resolved_once(monkeypatch, tmp_path):
    """Further processes see the strings of this one, also where they look like interpolations."""
    config = compose_config(["trainer.accelerator=cpu", "trainer.devices=2"], tmp_path)
    config.name = "\\${oc.env:HOME}"
    monkeypatch.setattr(launch, "run_processes", lambda function, number, work, content, *rest: content)
    content, _ = launch.launch(None, config)
    assert OmegaConf.create(content).name == "${oc.env:HOME}"


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
