"""Errors of the command line as one message."""

from __future__ import annotations

import os

import pytest
from hydra.errors import HydraException, MissingConfigException

from scatterbrain.attention import ATTENTIONS
from scatterbrain.errors import UserError
from src.utils.cli import FULL_ERROR, describe, report, run_cli


def failing(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.fixture(autouse=True)
def without_full_error(monkeypatch):
    monkeypatch.delenv(FULL_ERROR, raising=False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("experiment=a.yaml", "experiment=a"),
        ("+experiment=a.yml", "+experiment=a"),
        ("experiment=a.yaml,b.yaml,c", "experiment=a,b,c"),
        ("experiment=a.yamlish", "experiment=a.yamlish"),
        ("eval.ckpt=a.yaml", "eval.ckpt=a.yaml"),
    ],
)
def test_the_ending_of_an_experiment_is_left_out(given, expected):
    argv = ["experiment=kept.yaml", given]
    assert run_cli(lambda: None, argv) == 0
    assert argv == ["experiment=kept.yaml", expected]


@pytest.mark.parametrize("error", [UserError("a.pth is empty."), HydraException("a.pth is empty.")])
def test_an_error_of_the_user_is_one_line_and_status_1(capsys, error):
    assert run_cli(failing(error), ["run.py"]) == 1
    assert capsys.readouterr() == ("", "Error: a.pth is empty.\n")
    assert FULL_ERROR not in os.environ


def test_an_error_of_the_file_system_names_the_file(capsys):
    assert run_cli(failing(PermissionError(13, "Permission denied", "/logs/x")), ["run.py"]) == 1
    assert "/logs/x cannot be used (Permission denied)" in capsys.readouterr().err


def test_an_error_of_the_file_system_without_a_file(capsys):
    assert run_cli(failing(ConnectionResetError(104, "Connection reset by peer")), ["run.py"]) == 1
    expected = "Error: A file or connection cannot be used (Connection reset by peer). HYDRA_FULL_ERROR=1 shows which"
    assert capsys.readouterr().err.startswith(expected)


def test_an_attention_without_its_config(monkeypatch):
    error = MissingConfigException("", "model/t2tattn_cfg/new", options=["full", "local"])
    assert describe(error) == "There is no model/t2tattn_cfg=new. Choose one of: full, local."
    monkeypatch.setitem(ATTENTIONS, "new", ATTENTIONS["full"])
    assert describe(error) == (
        "The attention 'new' has no config. Write configs/model/t2tattn_cfg/new.yaml, see docs/adding_an_attention.md."
    )


def test_our_own_mistakes_are_raised():
    with pytest.raises(ZeroDivisionError):
        run_cli(failing(ZeroDivisionError()), ["run.py"])
    assert FULL_ERROR not in os.environ


def test_an_interrupt_is_status_130(capsys):
    assert run_cli(failing(KeyboardInterrupt()), ["run.py"]) == 130
    assert capsys.readouterr().err == ""


def test_the_traceback_is_shown_on_request(capsys, monkeypatch):
    monkeypatch.setenv(FULL_ERROR, "1")
    assert run_cli(failing(UserError("a.pth is empty.")), ["run.py"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "Error: a.pth is empty."
    assert os.environ[FULL_ERROR] == "1"
    monkeypatch.delenv(FULL_ERROR)
    run_cli(failing(UserError("again")), ["run.py"])
    assert capsys.readouterr().err == "Error: again\n"


def test_a_run_of_several_is_named(capsys):
    report(UserError("a.pth is empty."), "run 2")
    assert capsys.readouterr().err == "Error in run 2: a.pth is empty.\n"


def test_messages_of_several_lines_become_one():
    assert describe(HydraException("first\n   second")) == "first second"
