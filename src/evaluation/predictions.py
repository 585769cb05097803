"""The predictions of every image: `predictions.csv`."""

from __future__ import annotations

import csv
import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scatterbrain.errors import UserError
from src.evaluation.records import MAX_PREDICTIONS, Records
from src.utils.files import atomic_write
from src.utils.labels import NO_LABEL
from src.utils.text import abbreviate

PREDICTIONS_FILE = "predictions.csv"
PREDICTIONS_HEADER = [
    "image",
    "target",
    *(f"prediction_{rank}" for rank in range(1, MAX_PREDICTIONS + 1)),
    *(f"probability_{rank}" for rank in range(1, MAX_PREDICTIONS + 1)),
]


def write_predictions(
    folder: str | os.PathLike[str], image_paths: Sequence[str | os.PathLike[str]], records: Records
) -> Path:
    """Write `predictions.csv`: one row per image, sorted by path, from the first seed.

    With fewer than five classes the remaining cells are empty, and without labels `target` is. Probabilities have
    eight significant digits.

    Args:
        folder: the run's folder, which must exist.
        image_paths: N paths relative to the split's folder, in the order of `records`.
        records: of every image.

    Returns:
        Path of the file.

    Raises:
        ValueError: not N paths, or one of them twice or absolute.
        UserError: a probability is NaN or infinite, or the folder cannot be written to; no file is left then.
    """
    paths = [PurePosixPath(Path(path).as_posix()) for path in image_paths]
    if len(paths) != len(records.targets):
        raise ValueError(f"write_predictions: {len(paths)} paths for {len(records.targets)} images")
    if len(set(paths)) != len(paths) or any(path.is_absolute() for path in paths):
        raise ValueError("write_predictions: expected different paths relative to the split's folder")
    classes, probabilities = records.top5_classes[0], records.top5_probabilities[0]
    if not np.isfinite(probabilities).all():
        image = paths[int(np.argmax(~np.isfinite(probabilities).all(axis=1)))]
        raise UserError(
            f"The network produced NaN or infinite values: the probabilities of {image} are not numbers. "
            "Check the checkpoint, and evaluate with precision 32-true."
        )
    empty = [""] * (MAX_PREDICTIONS - classes.shape[1])
    path = Path(folder) / PREDICTIONS_FILE
    # Names of files are bytes: one that is not UTF-8 must not cost the results of a whole evaluation.
    with atomic_write(path, newline="", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(PREDICTIONS_HEADER)
        # By the parts of the path, as the classes' folders are walked: "a/b" comes before "a-b/a".
        for index in sorted(range(len(paths)), key=lambda i: paths[i].parts):
            writer.writerow(
                [
                    str(paths[index]),
                    "" if records.targets[index] == NO_LABEL else int(records.targets[index]),
                    *(int(label) for label in classes[index]),
                    *empty,
                    *(f"{probability:.8g}" for probability in probabilities[index]),
                    *empty,
                ]
            )
    return path


@dataclass(eq=False)
class Predictions:
    """The content of `predictions.csv`.

    Args:
        images: N paths relative to the split's folder.
        targets: (N,) output index of the right class, `NO_LABEL` without labels.
        classes: (N, P) output indices, most probable first, P = min(5, number of classes).
        probabilities: (N, P) their probabilities.
    """

    images: list[str]
    targets: NDArray[np.int64]
    classes: NDArray[np.int64]
    probabilities: NDArray[np.float64]


def read_predictions(folder: str | os.PathLike[str]) -> Predictions:
    """Read `predictions.csv`.

    Args:
        folder: the run's folder.

    Returns:
        The predictions, in the order of the file.

    Raises:
        UserError: the file is missing or damaged; the line is named.
    """
    path = Path(folder) / PREDICTIONS_FILE
    remedy = "Run the evaluation of this folder again."
    images: list[str] = []
    targets: list[int] = []
    classes: list[list[int]] = []
    probabilities: list[list[float]] = []
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, None)
            if header != PREDICTIONS_HEADER:
                raise UserError(f"{path} is damaged (its header is not that of predictions). {remedy}")
            for row in reader:
                try:
                    if len(row) != len(PREDICTIONS_HEADER):
                        raise ValueError(f"{len(row)} cells")
                    labels = [int(cell) for cell in row[2 : 2 + MAX_PREDICTIONS] if cell]
                    values = [float(cell) for cell in row[2 + MAX_PREDICTIONS :] if cell]
                    if not labels or len(labels) != len(values) or (classes and len(labels) != len(classes[0])):
                        raise ValueError(f"{len(labels)} predictions and {len(values)} probabilities")
                    targets.append(int(row[1]) if row[1] else NO_LABEL)
                except ValueError as error:
                    raise UserError(f"{path} is damaged (line {reader.line_num}: {error}). {remedy}") from error
                images.append(row[0])
                classes.append(labels)
                probabilities.append(values)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist. {remedy}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). {remedy}") from error
    except csv.Error as error:
        raise UserError(f"{path} is damaged ({error}). {remedy}") from error
    if not images:
        raise UserError(f"{path} is damaged (it has no images). {remedy}")
    if len(set(images)) != len(images):
        raise UserError(f"{path} is damaged (it has an image twice). {remedy}")
    return Predictions(images, np.array(targets), np.array(classes), np.array(probabilities))


# Predictions, their images without folder and suffix; images that were skipped; top-1 in percent.
Evaluation = tuple[Predictions, set[str], float]


def compare(ours: Evaluation, reference: Evaluation) -> dict[str, Any]:
    """Results of a format against those of class folders; `differences` say in words what differs."""
    (found, skipped, top1), (expected, expected_skipped, _) = ours, reference
    names, expected_names = Counter(found.images), Counter(expected.images)
    common = sorted(names.keys() & expected_names.keys())
    rows = ({name: row for row, name in enumerate(each.images)} for each in (found, expected))
    a, b = ([each[name] for name in common] for each in rows)
    other_label = found.targets[a] != expected.targets[b]
    other_class = found.classes[a, 0] != expected.classes[b, 0]
    # classes of about the same probability may come in another order
    same = found.classes[a][:, :, None] == expected.classes[b][:, None]
    difference = abs(found.probabilities[a][:, :, None] - expected.probabilities[b][:, None])
    differing = {
        "images": (names - expected_names) + (expected_names - names),
        "skipped images": skipped ^ expected_skipped,
        "labels": itertools.compress(common, other_label),
        "first predictions": itertools.compress(common, other_class),
    }
    return {
        "num_images": len(found.images),
        "num_skipped": len(skipped),
        "labels_equal": int((~other_label).sum()),
        "first_predictions_equal": int((~other_class).sum()),
        "probability_difference": float(difference[same].max(initial=0.0)),
        "top1": top1,
        "differences": [f"{what} ({text})" for what, images in differing.items() if (text := abbreviate(images))],
    }
