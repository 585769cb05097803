"""Files that a user asks for: written in one step, and never over another file without a backup."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import secrets
import types
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from scatterbrain.errors import UserError, is_number

T = TypeVar("T")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check, before a long computation, that `write_file` can write a file.

    Args:
        path: the file.

    Raises:
        UserError: it is a folder, or its folder does not exist or cannot be written to.
    """
    path = Path(path)
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError) as error:  # a name that is too long, or with a null character
        raise UserError(f"{str(path)[:100]!r} cannot be written ({error}). Choose another name.") from error
    if is_folder:
        raise UserError(f"{path} is a folder, but a file is to be written there. Choose another name.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written. Check that its folder exists and that you may write to it.")


def write_file(path: str | os.PathLike[str], content: str | bytes) -> Path | None:
    """Path of the backup `<path>.bak` (`.bak2`, ...) of a file that was there with another content, else None.

    Readers see the old file or the complete new one.

    Args:
        path: the file; its folder must exist.
        content: text (UTF-8) or bytes.

    Raises:
        UserError: the folder does not exist or cannot be written to, or `path` is a folder.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    check_writable(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        if path.is_file() and path.read_bytes() == data:
            return None
        if path.exists() and not path.is_file():  # /dev/null, a pipe: not to be replaced by a file
            path.write_bytes(data)
            return None
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        backup = _back_up(path) if path.exists() else None
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}). Check that its folder exists and that you may write to it."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return backup


def _back_up(path: Path) -> Path:
    for number in itertools.count(1):
        backup = path.with_name(f"{path.name}.bak{number if number > 1 else ''}")
        try:
            # one step, which fails where the name is taken
            os.link(path, backup)
        except FileExistsError:
            continue
        except OSError:  # a file system without links
            with contextlib.suppress(FileExistsError), open(backup, "xb") as file:
                file.write(path.read_bytes())
                return backup
            continue
        return backup
    raise AssertionError


def write_json(path: str | os.PathLike[str], kind: str, result: Any) -> Path | None:
    """Path of the backup as of `write_file`, of a JSON file with the fields of a report or a plan.

    Args:
        path: the file.
        kind: its entry `format`, which `read_json` asks for.
        result: a dataclass.

    Raises:
        UserError: the file cannot be written.
    """
    content = json.dumps({"format": kind, **asdict(result)}, indent=1, allow_nan=False, ensure_ascii=False)
    return write_file(path, content + "\n")


def read_json(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Fields of a report or a plan from a file of `write_json`.

    Args:
        path: the file.
        kind: what its entry `format` has to be.

    Raises:
        UserError: the file cannot be read, is no JSON, or is of another kind.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{os.fspath(path)} cannot be read ({error.strerror}). Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{os.fspath(path)} is no JSON file ({error}). Write it again with `save`.") from error
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != kind:
        raise UserError(f"{os.fspath(path)} is no '{kind}' but {found!r}. Write it with `save` of this version.")
    return content


def dataclass_of(kind: type[T], values: Mapping[str, Any]) -> T:
    """Instance of a dataclass from values of a file.

    Args:
        kind: the dataclass.
        values: its fields.

    Raises:
        TypeError: a field is missing or unknown, or its value is of another type, or not finite.
    """
    made = kind(**values)
    for name, hint in get_type_hints(kind).items():
        if not _fits(getattr(made, name), hint):
            raise TypeError(f"{name}={getattr(made, name)!r}")
    return made


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if hint is float:
        return is_number(value) and math.isfinite(value)
    return isinstance(value, hint) and isinstance(value, bool) == (hint is bool)
