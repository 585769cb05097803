"""The command line's side of errors: one short message on stderr and exit status 1."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable

from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.utils.errors import UserError, did_you_mean

FULL_ERROR = "HYDRA_FULL_ERROR"


def report(error: Exception) -> None:
    """Print the message of an error on stderr."""
    print(f"Error: {describe(error)}", file=sys.stderr, flush=True)


def describe(error: Exception) -> str:
    """What is wrong and what to do about it, in one paragraph.

    Args:
        error: a `UserError`, or an error of Hydra or OmegaConf about the command line.
    """
    if isinstance(error, UserError):
        return str(error)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException):
        return _describe_missing_config(error)
    if isinstance(cause, OmegaConfBaseException) and cause.full_key and cause.parent_node is not None:
        return _describe_config_key(cause)
    return " ".join(str(error).split())


def _describe_missing_config(error: MissingConfigException) -> str:
    """`model/t2tattn_cfg=sblocl`: the group's choices, near names first."""
    name = str(error.missing_cfg_file or "")
    group, _, choice = name.rpartition("/")
    if group and error.options:
        return f"There is no {group}={choice}. {did_you_mean(choice, error.options)}"
    return " ".join(str(error).split())


def _describe_config_key(error: OmegaConfBaseException) -> str:
    """`datamodule.batchsize=64`: the option and those that are near."""
    message = str(error.msg or error).splitlines()[0].rstrip(".")
    key = str(error.full_key)
    parent = error.parent_node
    known = [str(name) for name in parent] if OmegaConf.is_dict(parent) else []
    hint = did_you_mean(key.rpartition(".")[2], known) if known else ""
    if "is not in struct" in message:
        return f"There is no option '{key}'. {hint}"
    return f"{message} (option '{key}'). See --help for the options."


def run_cli(main: Callable[[], None], argv: list[str]) -> int:
    """Run a Hydra entry point so that any mistake of the user's ends with one message and no traceback.

    Args:
        main: the function that `hydra.main` decorates.
        argv: command line, edited in place: `experiment=name.yaml` is `experiment=name`.

    Returns:
        Exit status: 0, or 1 after an error of the user's. With HYDRA_FULL_ERROR=1 the error is raised instead.
    """
    argv[1:] = [re.sub(r"^(\+?experiment=[^=]*)\.ya?ml$", r"\1", argument) for argument in argv[1:]]
    if os.environ.get(FULL_ERROR, "0") not in ("", "0"):
        main()
        return 0
    # Hydra would print errors of its own and leave by sys.exit; raised, they pass through here
    os.environ[FULL_ERROR] = "1"
    try:
        main()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        report(error)
        return 1
    finally:
        del os.environ[FULL_ERROR]
    return 0
