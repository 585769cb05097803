"""The one exception that means "the input is wrong", and the words it is told in.

Everything a user can get wrong (a path, a checkpoint, an option, a tensor's shape) is raised as `UserError`.
Entry points print its message on stderr and exit with status 1; a traceback is left for our own mistakes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Bad input: the message names the culprit and the remedy, in that order."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Hint for a misspelt name.

    Args:
        name: what was given.
        known: the names that would have been accepted.

    Returns:
        `"Did you mean 'a' or 'b'?"` where near names exist, `"Choose one of: ..."` otherwise.
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.6)
    if near:
        return "Did you mean " + " or ".join(f"'{item}'" for item in near) + "?"
    return "Choose one of: " + ", ".join(known) + "."


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_switch(option: str, value: Any) -> None:
    """Refuse anything but true and false.

    Args:
        option: its name on the command line, for the message.
        value: what was given.

    Raises:
        UserError: the value is another.
    """
    if not isinstance(value, bool):
        raise UserError(f"{option}={value!r} is not valid. Give true or false.")


def check_whole_number(option: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """Refuse anything but a whole number in [minimum, maximum].

    Args:
        option: its name on the command line, for the message.
        value: what was given.
        minimum: smallest value.
        maximum: largest value; None is no limit.

    Raises:
        UserError: the value is another.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum or value > (maximum or value):
        limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise UserError(f"{option}={value} is not valid. Give a whole number {limits}.")
