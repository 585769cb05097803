"""The exception for wrong input, and checks that raise it.

What a user can get wrong (a path, a checkpoint, an option, a tensor's shape) raises `UserError`. Entry points print its
message on stderr and exit with status 1; a traceback means a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Wrong input: the message names the culprit and the remedy, in that order."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggestion of near names for a misspelt one.

    Args:
        name: the name that was given.
        known: the names that are accepted.

    Returns:
        `"Did you mean 'a' or 'b'?"` where near names exist, `"Choose one of: ..."` otherwise.
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.6)
    if near:
        return "Did you mean " + " or ".join(f"'{item}'" for item in near) + "?"
    return "Choose one of: " + ", ".join(known) + "."


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, and not a bool."""
    # a tuple: torch.compile of PyTorch 2.6 traces no union
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_switch(option: str, value: Any) -> None:
    """Check that an option is true or false.

    Args:
        option: its name, for the message.
        value: its value.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, bool):
        raise UserError(f"{option}={value!r} is not valid. Give true or false.")


def check_value_weight(value_weight: Any) -> None:
    """Check the weight of the values in the clustering of keys.

    Raises:
        UserError: it is negative, above 1e6, or no number.
    """
    # the square of a much larger one overflows in float32, and with 1e6 values alone count already
    if not is_number(value_weight) or not 0 <= value_weight <= 1e6:
        raise UserError(
            f"value_weight={value_weight!r} has to be a number of at least 0 and at most 1e6; 0 is for keys alone."
        )


def check_whole_number(option: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """Check that an option is a whole number in [minimum, maximum].

    Args:
        option: its name, for the message.
        value: its value.
        minimum: smallest value.
        maximum: largest value; None is no limit.

    Raises:
        UserError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum or value > (maximum or value):
        limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise UserError(f"{option}={value} is not valid. Give a whole number {limits}.")
