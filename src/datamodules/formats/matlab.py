"""Two columns of the development kit's `meta.mat`, without SciPy.

The file is in MATLAB's level 5 format ("MAT-File Format", The MathWorks, chapter 1): a header of 128 bytes, then data
elements, each with a tag of type and length, padded to 8 bytes, and compressed by zlib. Supports only what the kit
uses: a structure array whose fields are numbers and strings. Unlike a pickle, the file contains no code.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

_MATRIX, _COMPRESSED = 14, 15
# Numeric element types to format characters of `struct`.
_NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
_TEXT = {16: "utf-8", 17: "utf-16", 18: "utf-32"}
_STRUCTURE, _CHARACTERS = 2, 4
# Of decompressed data; the kit's file has 60 kB, 1 MB decompressed.
_MAX_BYTES = 1 << 26


class MatlabError(ValueError):
    """Not a valid MAT file of level 5, or without the expected contents."""


def read_structure(data: bytes, variable: str, fields: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """Fields of a structure array in a MAT file of level 5.

    Args:
        data: content of the file.
        variable: name of the structure array.
        fields: the fields to return.

    Returns:
        For each element of the array, in MATLAB's order, its `fields`: a string, or the first of its numbers (None
        if there is none, or it is neither).

    Raises:
        MatlabError: not a MAT file of level 5, damaged, or without the variable or a field.
    """
    try:
        order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
        if order is None:
            raise MatlabError("not a MATLAB file of level 5")
        for kind, content in _elements(data[128:], order):
            if kind == _COMPRESSED:
                unpack = zlib.decompressobj()
                unpacked = unpack.decompress(content, _MAX_BYTES)
                if not unpack.eof:
                    raise MatlabError("a compressed part is damaged")
                ((kind, content),) = _elements(unpacked, order)
            if kind == _MATRIX:
                parts = _elements(content, order)
                kind_of_array = _kind_of_array(parts)
                next(parts)  # dimensions
                if next(parts)[1].decode("ascii") == variable and kind_of_array == _STRUCTURE:
                    return _rows(parts, order, fields)
    except (struct.error, zlib.error, UnicodeDecodeError, StopIteration, IndexError, ValueError) as error:
        if isinstance(error, MatlabError):
            raise
        raise MatlabError("damaged") from error
    raise MatlabError(f"it has no structure '{variable}'")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and content of each data element."""
    at = 0
    while at < len(data):
        (tag,) = struct.unpack_from(order + "I", data, at)
        if tag >> 16:  # a small element: type and length in four bytes, the content in the next four
            kind, length, begin, end = tag & 0xFFFF, tag >> 16, at + 4, at + 8
        else:
            kind, (length,), begin = tag, struct.unpack_from(order + "I", data, at + 4), at + 8
            end = begin + length if kind == _COMPRESSED else begin + -(-length // 8) * 8
        if length > len(data) - begin:
            raise MatlabError("it ends too early")
        yield kind, data[begin : begin + length]
        at = end


def _kind_of_array(parts: Iterator[tuple[int, bytes]]) -> int:
    """The array's class: the lowest byte of its first element, in either byte order."""
    flags = next(parts)[1]
    return flags[0] or flags[3]


def _rows(parts: Iterator[tuple[int, bytes]], order: str, fields: tuple[str, ...]) -> list[tuple[Any, ...]]:
    (width,) = struct.unpack(order + "i", next(parts)[1])
    names = next(parts)[1]
    if width < 1:
        raise MatlabError("damaged")
    known = [names[at : at + width].split(b"\0")[0].decode("ascii") for at in range(0, len(names), width)]
    missing = [name for name in fields if name not in known]
    if missing:
        raise MatlabError(f"it has no field '{missing[0]}'")
    places = [known.index(name) for name in fields]
    values = [content for _, content in parts]
    if len(values) % len(known):
        raise MatlabError("it ends too early")
    return [
        tuple([_value(values[row + place], order) for place in places]) for row in range(0, len(values), len(known))
    ]


def _value(matrix: bytes, order: str) -> Any:
    """A string, or the first of the numbers."""
    parts = _elements(matrix, order)
    kind_of_array = _kind_of_array(parts)
    next(parts), next(parts)  # dimensions, name
    kind, content = next(parts, (0, b""))
    if kind_of_array == _CHARACTERS:
        if kind in _TEXT:
            suffix = "" if kind == 16 else "-le" if order == "<" else "-be"
            return content.decode(_TEXT[kind] + suffix)
        return "".join(map(chr, _numbers(kind, content, order)))
    return next(iter(_numbers(kind, content, order)), None)


def _numbers(kind: int, content: bytes, order: str) -> tuple[float, ...]:
    if kind not in _NUMBERS:
        return ()
    code = _NUMBERS[kind]
    return struct.unpack(f"{order}{len(content) // struct.calcsize(order + code)}{code}", content)
