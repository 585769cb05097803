"""Short texts for messages."""

from __future__ import annotations

from collections.abc import Iterable


def abbreviate(names: Iterable[str], limit: int = 5) -> str:
    """The first `limit` names in sorted order, and how many more there are: `a, b and 3 more`."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or the error's class if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
