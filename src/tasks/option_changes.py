"""Options that differ between two configurations, for messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def option_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The options that differ, as `"name=old (now new)"`.

    Args:
        old: options, which may be nested.
        new: options, in the order of the list.
    """
    old, new = _flat(old), _flat(new)
    return [
        f"{name}={old.get(name)} (now {new.get(name)})"
        for name in dict.fromkeys([*new, *old])
        if old.get(name) != new.get(name)
    ]


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options by their full names."""
    flat = {}
    for name, value in options.items():
        inner = _flat(value) if isinstance(value, Mapping) else {}
        flat |= {f"{name}.{key}": item for key, item in inner.items()} or {name: value}
    return flat
