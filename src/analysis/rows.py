"""Files of results: JSON with one row a line, small in the repository and readable in a diff."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from src.utils.files import atomic_write


def write_rows(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write an object as JSON: one line for each key, and in a list of objects one line for each of them.

    Args:
        path: the file; it is replaced in one step, see `atomic_write`.
        content: header (machine, settings, ...) and tables (lists of rows), by name.

    Raises:
        UserError: see `atomic_write`.
        ValueError: a number is NaN or infinite, which JSON does not have.
    """

    def line(value: Any) -> str:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)

    def block(value: Any) -> str:
        if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            return "[\n" + ",\n".join(f"    {line(row)}" for row in value) + "\n  ]"
        return line(value)

    text = ",\n".join(f"  {line(name)}: {block(value)}" for name, value in content.items())
    with atomic_write(path) as file:
        file.write(f"{{\n{text}\n}}\n")
