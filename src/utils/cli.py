"""Errors on the command line: one short message on stderr and exit status 1."""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from scatterbrain.errors import UserError, did_you_mean

FULL_ERROR = "HYDRA_FULL_ERROR"
# What is reported by its message alone; anything else is a bug.
USER_ERRORS = (UserError, HydraException, OmegaConfBaseException, OSError)
CONFIGS = Path(__file__).parents[2] / "configs"
# Values that Hydra reads as null, a switch, a number or a dictionary.
_NO_NAME = r"(?i:null|true|false|nan|[+-]?inf)|[+-]?[\d._]+(?:[eE][+-]?\d+)?|\{.*\}"
# Whether the user requested tracebacks; set by `run_cli`, which changes the environment variable for Hydra.
_show_traceback = False


def report(error: Exception, origin: str | None = None) -> None:
    """Print the message of an error on stderr, after its traceback if HYDRA_FULL_ERROR=1.

    Args:
        error: see `describe`.
        origin: where it comes from if the command has several parts, such as `"run 2"`.
    """
    if _show_traceback:
        traceback.print_exception(error)
    where = "" if origin is None else f" in {origin}"
    print(f"Error{where}: {describe(error)}", file=sys.stderr, flush=True)


def describe(error: Exception) -> str:
    """The message of an error, with its remedy, in one paragraph.

    Args:
        error: a `UserError`, an error of Hydra or OmegaConf about the command line, or one of the file system.
    """
    if isinstance(error, UserError):
        return str(error)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, OverrideParseException):
        return (
            f"Cannot read '{error.override}'. Give options as option=value, and quote a value that holds commas, "
            "brackets, spaces or =: 'option=\"a, b\"'."
        )
    if isinstance(error, MissingConfigException):
        return _describe_missing_config(error)
    if isinstance(cause, OmegaConfBaseException) and cause.full_key and cause.parent_node is not None:
        return _describe_config_key(cause)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be used ({error.strerror}). Check the path, its permissions and its disk."
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        return f"A file or connection cannot be used ({reason}). {FULL_ERROR}=1 shows which, with the traceback."
    return " ".join(str(error).split())


def _describe_missing_config(error: MissingConfigException) -> str:
    """For `model/t2tattn_cfg=sblocl`: the group's choices, similar names first."""
    name = str(error.missing_cfg_file or "")
    group, _, choice = name.rpartition("/")
    if group == "model/t2tattn_cfg" and (message := describe_missing_attention_config(choice)):
        return message
    if group and error.options:
        return f"There is no {group}={choice}. {did_you_mean(choice, error.options)}"
    return " ".join(str(error).split())


def _describe_group_overrides(arguments: list[str]) -> str:
    """For `mode=null` and `datamodule=3`: which groups are given a value that is no name of a file."""
    pairs = (argument.lstrip("+~").partition("=") for argument in arguments)
    wrong = [
        f"{name}={value}" for name, _, value in pairs if re.fullmatch(_NO_NAME, value) and (CONFIGS / name).is_dir()
    ]
    which = f"{', '.join(wrong)}: " if wrong else ""
    kind = "null" if wrong and all(each.endswith("=null") for each in wrong) else "null, a number, true or false"
    return f"{which}a group cannot be {kind}. Leave it out, or choose one of its files (see --help)."


def describe_missing_attention_config(name: str) -> str | None:
    """Message about an attention of the library that has no config; None for any other name."""
    from scatterbrain.attention import ATTENTIONS  # imports torch, which few messages need

    if name not in ATTENTIONS:
        return None
    return (
        f"The attention '{name}' has no config. Write configs/model/t2tattn_cfg/{name}.yaml, see "
        "docs/adding_an_attention.md."
    )


def _describe_config_key(error: OmegaConfBaseException) -> str:
    """For `datamodule.batchsize=64`: the option and similar ones."""
    message = str(error.msg or error).splitlines()[0].rstrip(".")
    key = str(error.full_key)
    if "is not in struct" not in message:
        return f"{message} (option '{key}'). See --help for the options."
    if "/" in key:
        return f"There is no group '{key}'. See --help for the groups."
    parent, _, name = key.rpartition(".")
    known = [option for option in map(str, error.parent_node or ()) if option not in ("hydra", "_target_")]
    if not known:
        return f"There is no option '{key}', since '{parent}' is not set. See --help for the groups that set it."
    return f"There is no option '{key}'. {did_you_mean(name, known)}"


def run_cli(main: Callable[[], None], argv: list[str]) -> int:
    """Run a Hydra entry point; an error of the user's ends with one message and no traceback.

    Args:
        main: the function that `hydra.main` decorates.
        argv: command line, edited in place: `experiment=name.yaml` becomes `experiment=name`.

    Returns:
        Exit status: 0, 1 after an error of the user's, 130 after Ctrl-C. HYDRA_FULL_ERROR=1 adds the traceback.
    """
    global _show_traceback
    argv[1:] = [_without_yaml(argument) for argument in argv[1:]]
    before = os.environ.get(FULL_ERROR)
    _show_traceback = before == "1"
    # Hydra raises its errors here instead of printing them and calling sys.exit
    os.environ[FULL_ERROR] = "1"
    try:
        for argument in argv[1:]:
            if argument.startswith("="):  # Hydra's parser reads it as a group without a name
                raise UserError(f"Cannot read '{argument}'. Give options as option=value.")
        main()
    except USER_ERRORS as error:
        report(error)
        return 1
    except ValueError as error:
        if "Config group override must be" not in str(error):  # Hydra's only check that is no HydraException
            raise
        report(UserError(_describe_group_overrides(argv[1:])))
        return 1
    except SystemExit as end:  # argparse, for an unknown flag: usage and one line
        return 1 if end.code == 2 else int(end.code or 0)
    except KeyboardInterrupt:
        return 130
    finally:
        if before is None:
            del os.environ[FULL_ERROR]
        else:
            os.environ[FULL_ERROR] = before
    return 0


def command_line() -> str:
    """The command that was run, quoted for a shell."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def replace_what_cannot_be_encoded() -> None:
    """Let stdout and stderr print `?` for a character that the terminal's encoding lacks, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _without_yaml(argument: str) -> str:
    """`experiment=a.yaml,b.yaml` as `experiment=a,b`; anything else as it is."""
    if not re.match(r"\+?experiment=", argument):
        return argument
    return re.sub(r"\.ya?ml(?=,|$)", "", argument)
