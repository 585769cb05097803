"""Files of results: JSON with one row a line, so that a change of a result is a change of a line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from scatterbrain.errors import UserError
from src.evaluation.results import read_json
from src.utils.files import atomic_write


def write_rows(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write one object as JSON, each of its entries on one line, and each row of a list of rows likewise.

    Args:
        path: where the file goes; it is replaced in one step, see `atomic_write`.
        content: values that JSON has; a row is a dictionary or a list.

    Raises:
        UserError: the path cannot be written.
        ValueError: a number is NaN or infinite.
    """

    def text(value: Any) -> str:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)

    entries = []
    for name, value in content.items():
        is_table = isinstance(value, list | tuple) and value and all(isinstance(row, dict | list) for row in value)
        cells = "[\n{}\n]".format(",\n".join(map(text, value))) if is_table else text(value)
        entries.append(f"{text(name)}: {cells}")
    with atomic_write(path) as file:
        file.write("{{\n{}\n}}\n".format(",\n".join(entries)))


def read_rows(path: str | os.PathLike[str], names: Sequence[str], remedy: str) -> dict[str, Any]:
    """What `write_rows` has written.

    Args:
        path: the file.
        names: entries that it has at least.
        remedy: what the user can do about a file that is not one, a sentence.

    Raises:
        UserError: the file cannot be read, or lacks an entry.
    """
    content = read_json(path, remedy)
    if not set(names) <= set(content):
        raise UserError(f"{os.fspath(path)} holds no results of this kind. {remedy}")
    return content
