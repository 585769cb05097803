"""Classes of images: ImageNet-1k's synsets, and the output index of each class."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from timm.data import ImageNetInfo

from scatterbrain.errors import UserError
from src.utils.text import abbreviate


@functools.cache
def imagenet_synsets() -> dict[str, int]:
    """ImageNet-1k's synset names, `n01440764` to `n15075141`, with the output index of each (0 to 999)."""
    return {name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def class_index(names: Iterable[str], num_classes: int = 1000, what: str = "class folders") -> dict[str, int]:
    """Map each class to the index of its model output.

    Classes that are all named after ImageNet-1k synsets get the standard indices, so a subset of ImageNet's
    classes has the same labels as the whole set. Any other classes are numbered in sorted order.

    Args:
        names: names of the classes, in any order.
        num_classes: outputs of the model.
        what: what the names belong to, for messages.

    Returns:
        Name to index in [0, num_classes), in sorted order of the names.

    Raises:
        UserError: no classes; synsets mixed with other names; synsets while `num_classes` is not 1000; a number of
            other names that is not `num_classes`.
    """
    names = sorted(set(names))
    if not names:
        raise UserError("No class folders. Put the images in one folder per class.")
    synsets = imagenet_synsets()
    others = [name for name in names if name not in synsets]
    if not others:
        if num_classes != len(synsets):
            raise UserError(
                f"The {what} ({abbreviate(names)}) are ImageNet-1k synsets, which stand for {len(synsets)} "
                f"classes, but the model has {num_classes}. Set model.num_classes={len(synsets)}, or rename the "
                f"{what.split()[-1]} to have them numbered in sorted order."
            )
        return {name: synsets[name] for name in names}
    if len(others) < len(names):
        raise UserError(
            f"{len(others)} of {len(names)} {what} are not ImageNet-1k synsets, unlike the rest: "
            f"{abbreviate(others)}. Remove or rename them: {what} are either all synsets "
            "(n01440764, ...) or all other names."
        )
    if len(names) != num_classes:
        raise UserError(
            f"{len(names)} {what} ({abbreviate(names)}), but the model has {num_classes} classes. Set "
            f"model.num_classes={len(names)} and a checkpoint trained on these classes, or give the data the "
            "model was trained on."
        )
    return {name: index for index, name in enumerate(names)}


def index_of_labels(labels: set[str] | set[int], num_classes: int, what: str) -> dict[str, int]:
    """Like `class_index`, for labels that may also be indices: name to index, sorted by index in that case.

    Raises:
        UserError: an index outside [0, num_classes), or see `class_index`.
    """
    if not all(isinstance(label, int) for label in labels):
        return class_index(labels, num_classes, what)
    outside = sorted(label for label in labels if not 0 <= label < num_classes)
    if outside:
        raise UserError(
            f"The label {outside[0]} is outside 0 to {num_classes - 1}, the model's {num_classes} classes. Set "
            "model.num_classes and a checkpoint trained on these classes, or correct the labels: they start at 0."
        )
    synsets = list(imagenet_synsets())
    names = synsets if num_classes == len(synsets) else [str(index) for index in range(num_classes)]
    return {names[label]: label for label in sorted(labels)}
