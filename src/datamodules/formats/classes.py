"""Classes of images: ImageNet-1k's synsets, and the output index of each class."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo

from scatterbrain.errors import UserError
from src.datamodules.formats.files import read_file
from src.utils.text import abbreviate, first_line

logger = logging.getLogger(__name__)

ORDERS = ("sorted", "natural")
LABELS = ("auto", "imagenet", "own", "none")


@dataclass(frozen=True)
class ClassNumbering:
    """How names of classes become indices of the model's outputs.

    Args:
        order: of classes with their own numbering: `"sorted"` by character, as torchvision and Keras do; `"natural"`,
            numbers by value and without case, as timm's folder reader does; or a file of the names in the order of
            the outputs, see `read_class_order`, which decides over synsets and numbers too.
        labels: of classes named after ImageNet-1k synsets: `"imagenet"` gives them the standard indices, `"own"`
            numbers them like any other names, `"auto"` decides by the number of the model's outputs. `"none"` reads the
            image files in a folder without classes, see `list_unlabelled`.

    Raises:
        UserError: an invalid value.
    """

    order: str = "sorted"
    labels: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.order, str) or not self.order:
            raise UserError(
                f"datamodule.class_order={self.order!r} is not valid. Give sorted, natural or a file with one class a "
                "line."
            )
        if self.labels not in LABELS:
            raise UserError(f"datamodule.labels={self.labels!r} is not valid. Give one of {', '.join(LABELS)}.")
        if not self.labelled and self.order != "sorted":
            raise UserError(
                f"datamodule.labels=none reads images without classes, but datamodule.class_order={self.order} orders "
                "classes. Leave one of them out."
            )
        if self.labels != "auto" and self.from_file:
            raise UserError(
                f"datamodule.labels={self.labels} and the file datamodule.class_order={self.order} both number the "
                "classes. Leave one of them out."
            )

    @property
    def labelled(self) -> bool:
        """Whether the images have classes."""
        return self.labels != "none"

    @property
    def from_file(self) -> bool:
        """Whether a file lists the classes in the order of the outputs."""
        return self.order not in ORDERS


DEFAULT_NUMBERING = ClassNumbering()


def natural_key(name: str) -> tuple[Any, ...]:
    """Sort key of timm's folder reader: digits by value, letters without case; ties by character."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def read_class_order(path: str) -> list[str]:
    """Names of the classes in the order of the model's outputs.

    Args:
        path: a text file with one name a line, or JSON: a list of names, an object of name to index, or of index to
            name or to a list that starts with the name (`imagenet_class_index.json`); `~` is expanded.

    Raises:
        UserError: it cannot be read, is neither, or has a name twice or an index missing.
    """
    try:
        text = read_file(Path(path).expanduser()).decode("utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"datamodule.class_order={path} is neither sorted nor natural, and no file that can be read: "
            f"{getattr(error, 'strerror', None) or first_line(error)}. Give a file with one class a line."
        ) from None
    names: Any = [line.strip() for line in text.splitlines() if line.strip()]
    if text.lstrip()[:1] in ("[", "{"):
        try:
            names = _names_in_json(json.loads(text))
        except (ValueError, TypeError, IndexError, RecursionError):
            names = None
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise UserError(
            f"{path} (datamodule.class_order) does not list classes. Give one name a line, or JSON: a list of names, "
            "or an object of names and indices that count from 0, each once."
        )
    return names


def _names_in_json(content: Any) -> list[Any] | None:
    """The names in the order of their indices; None where indices are not 0 to N - 1."""
    if isinstance(content, list):
        return content
    if all(isinstance(index, int) for index in content.values()):
        by_index = {index: name for name, index in content.items()}
    else:
        by_index = {int(index): name[0] if isinstance(name, list) else name for index, name in content.items()}
    complete = len(by_index) == len(content) and set(by_index) == set(range(len(content)))
    return [by_index[index] for index in range(len(content))] if complete else None


@functools.cache
def imagenet_synsets() -> dict[str, int]:
    """ImageNet-1k's synset names, `n01440764` to `n15075141`, with the output index of each (0 to 999)."""
    return {name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def class_index(
    names: Iterable[str],
    num_classes: int = 1000,
    what: str = "class folders",
    numbering: ClassNumbering = DEFAULT_NUMBERING,
) -> dict[str, int]:
    """Map each class to the index of its model output.

    Classes that are all named after ImageNet-1k synsets get the standard indices, so a subset of ImageNet's
    classes has the same labels as the whole set. Names that are exactly 0 to `num_classes` - 1, as in ImageNetV2, are
    indices themselves. Any other classes, and synsets for a model with one output for each, are numbered in the order
    of `numbering`, with a warning if the sorted and the natural order differ.

    Args:
        names: names of the classes, in any order.
        num_classes: outputs of the model.
        what: what the names belong to, for messages.
        numbering: order and labels.

    Returns:
        Name to index in [0, num_classes), in sorted order of the names.

    Raises:
        UserError: no classes; a number of classes that does not fit `num_classes`; for a model with 1000 outputs,
            synsets mixed with other names; a class that is not in the file `numbering.order`, or the file is invalid.
    """
    names = sorted(set(names))
    if not names:
        raise UserError("No class folders. Put the images in one folder per class.")
    if numbering.from_file:
        return _index_from_file(names, num_classes, what, numbering.order)
    if len(names) == num_classes and set(names) == {str(index) for index in range(num_classes)}:
        return {name: int(name) for name in names}
    synsets = imagenet_synsets()
    others = [name for name in names if name not in synsets]
    if numbering.labels == "imagenet" or (
        numbering.labels == "auto"
        and len(others) < len(names)
        and (num_classes == len(synsets) or (not others and len(names) != num_classes))
    ):
        if others:
            raise UserError(
                f"{len(others)} of {len(names)} {what} are not ImageNet-1k synsets, unlike the rest: "
                f"{abbreviate(others)}. Remove or rename them: {what} are either all synsets "
                "(n01440764, ...) or all other names. For a model trained on exactly these classes, set "
                f"model.num_classes={len(names)} datamodule.labels=own"
            )
        if num_classes != len(synsets):
            raise UserError(
                f"The {what} ({abbreviate(names)}) are {len(names)} ImageNet-1k synsets, which stand for "
                f"{len(synsets)} classes, but the model has {num_classes}. Set model.num_classes={len(synsets)}, or "
                f"for a model trained on exactly these classes model.num_classes={len(names)} datamodule.labels=own"
            )
        return {name: synsets[name] for name in names}
    if len(names) != num_classes:
        raise UserError(
            f"{len(names)} {what} ({abbreviate(names)}), but the model has {num_classes} classes. Set "
            f"model.num_classes={len(names)} and a checkpoint trained on these classes, or give the data the "
            "model was trained on."
        )
    if numbering.labels == "auto" and len(others) < len(names):
        logger.info(
            "The %d %s with ImageNet-1k synsets are numbered from 0, since the model has %d outputs "
            "(datamodule.labels=own).",
            len(names),
            what,
            num_classes,
        )
    natural = sorted(names, key=natural_key)
    if numbering.order == "natural":
        order = natural
    else:
        order = names
        if natural != names:
            _warn_of_order(names, natural, what)
    index_of = {name: index for index, name in enumerate(order)}
    return {name: index_of[name] for name in names}


def _warn_of_order(names: list[str], natural: list[str], what: str) -> None:
    first = next(index for index, (a, b) in enumerate(zip(names, natural, strict=True)) if a != b)
    both = [
        ", ".join(order[first : first + 5]) + (", ..." if first + 5 < len(order) else "") for order in (names, natural)
    ]
    logger.warning(
        "The %s are numbered in sorted order (from index %d: %s), which is not the natural order (%s) of timm's folder "
        "reader. If the checkpoint was trained in the latter, set datamodule.class_order=natural",
        what,
        first,
        *both,
    )


def _file_names(num_classes: int, path: str) -> list[str]:
    names = read_class_order(path)
    if len(names) != num_classes:
        raise UserError(
            f"{path} (datamodule.class_order) lists {len(names)} classes, but the model has {num_classes}. Give one "
            "name for each output."
        )
    return names


def _index_from_file(names: list[str], num_classes: int, what: str, path: str) -> dict[str, int]:
    index_of = {name: index for index, name in enumerate(_file_names(num_classes, path))}
    unknown = [name for name in names if name not in index_of]
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(names)} {what} are not in {path} (datamodule.class_order): {abbreviate(unknown)}. "
            "Add them in the place of their output, or remove them from the data."
        )
    return {name: index_of[name] for name in names}


def index_of_labels(
    labels: set[str] | set[int], num_classes: int, what: str, numbering: ClassNumbering = DEFAULT_NUMBERING
) -> dict[str, int]:
    """Like `class_index`, for labels that may also be indices: name to index, sorted by index in that case.

    Raises:
        UserError: an index outside [0, num_classes), or see `class_index`.
    """
    if not all(isinstance(label, int) for label in labels):
        return class_index(labels, num_classes, what, numbering)
    outside = sorted(label for label in labels if not 0 <= label < num_classes)
    if outside:
        raise UserError(
            f"The label {outside[0]} is outside 0 to {num_classes - 1}, the model's {num_classes} classes. Set "
            "model.num_classes and a checkpoint trained on these classes, or correct the labels: they start at 0."
        )
    synsets = list(imagenet_synsets())
    if numbering.from_file:
        names = _file_names(num_classes, numbering.order)
    elif num_classes == len(synsets) and numbering.labels != "own":
        names = synsets
    else:
        names = [str(index) for index in range(num_classes)]
    return {names[label]: label for label in sorted(labels)}
