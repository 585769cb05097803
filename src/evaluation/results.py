"""What one evaluation leaves behind: `results.json` (the figures) and `predictions.csv` (every image)."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from rich.table import Table

from scatterbrain.errors import UserError
from src.evaluation.published import PublishedFigure, published_top1
from src.utils.files import atomic_write, name_for_json, write_json

RESULTS_FILE = "results.json"
PREDICTIONS_FILE = "predictions.csv"
MAX_PREDICTIONS = 5
PREDICTIONS_HEADER = [
    "image",
    "target",
    *(f"prediction_{rank}" for rank in range(1, MAX_PREDICTIONS + 1)),
    *(f"probability_{rank}" for rank in range(1, MAX_PREDICTIONS + 1)),
]


class CheckpointInfo(TypedDict):
    """The weights of a run: `path` as given, and the SHA-256 of the file; both None for untrained weights."""

    path: str | None
    sha256: str | None


class DataInfo(TypedDict):
    """The images of a run: the folder `dir`, its `split`, how many images, and the model's classes.

    Images that were skipped since they could not be decoded are not among the number.
    """

    dir: str
    split: str
    num_images: int
    num_classes: int


class SkippedInfo(TypedDict):
    """Images that could not be decoded and were left out: how many, and each by its name with the reason."""

    number: int
    images: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Results:
    """The content of `results.json`, fields in the order of the file.

    Args:
        model: name of the variant.
        attention: name of the token stages' attention config; None for a model that keeps its own.
        checkpoint: path and SHA-256 of the weights.
        data: folder, split, number of images and of classes.
        image_size: side of the input, pixels.
        precision: Lightning's name of it, such as `"32-true"`.
        device: name of the device, such as `"cpu"`.
        seeds: one per draw of the random features.
        top1: top-1 accuracy, percent, mean over seeds.
        top5: top-5 accuracy, percent, mean over seeds.
        loss: cross-entropy, nats, mean over images and seeds.
        top1_per_seed: top-1 accuracy of each seed, percent.
        top1_std: sample deviation of `top1_per_seed`, points; None with one seed.
        images_per_second: throughput: of the whole run, the loader included; in one pass with several attentions, of
            the device's work on this one. Of a run that was interrupted and resumed, that of its last part.
        peak_memory_mib: peak memory of the device, MiB; None on the CPU, and in one pass with several attentions.
        versions: version of Python and of each library that matters.
        command: the command that was run.
        attention_options: options of the attention of both token stages; None where there is none.
        attention_memory: its memory over both token stages, as a fraction of what the full attention matrix
            takes; None where that does not apply.
        seconds: how long the evaluation (its last part) took, as far as `images_per_second` counts it; None if not
            measured.
        random_features: where they come from: drawn from the `seeds`, or stored in the `checkpoint`, which was trained
            with them; None where there are none.
        fast: whether the model's inference form was evaluated, see `src.models.inference`.
        complete: whether all images (that can be decoded) were evaluated; false after an interruption, and all figures
            are then those of the images so far.
        num_evaluated: number of images evaluated, of `data["num_images"]`; None in files of earlier versions, for all.
        skipped: with `datamodule.on_error=skip`, the images left out, named and sorted as in `predictions.csv`; those
            met so far where `complete` is false. None, and not in the file, where such an image is an error.
    """

    model: str
    attention: str | None
    checkpoint: CheckpointInfo
    data: DataInfo
    image_size: int
    precision: str
    device: str
    seeds: list[int]
    top1: float
    top5: float
    loss: float
    top1_per_seed: list[float]
    top1_std: float | None
    images_per_second: float
    peak_memory_mib: float | None
    versions: dict[str, str]
    command: str
    attention_options: list[dict[str, Any]] | None = None
    attention_memory: float | None = None
    seconds: float | None = None
    random_features: str | None = None
    fast: bool = False
    complete: bool = True
    num_evaluated: int | None = None
    skipped: SkippedInfo | None = None

    @property
    def published(self) -> PublishedFigure | None:
        """The published top-1 of this very configuration on the whole ImageNet validation set, if any."""
        if not self.complete:
            return None
        return published_top1(
            self.model,
            self.attention,
            num_classes=self.data["num_classes"],
            image_size=self.image_size,
            num_images=self.data["num_images"],
        )


def _numpy(values: ArrayLike | torch.Tensor, dtype: type) -> NDArray[Any]:
    if isinstance(values, torch.Tensor):
        # NumPy has no bfloat16, and every float is to be a double anyway.
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    array = np.asarray(values)
    if dtype is np.int64 and array.dtype.kind not in "iu":
        raise ValueError(f"Records: targets and classes must be integers, got {array.dtype}")
    return array.astype(dtype)


@dataclass(eq=False)
class Records:
    """What an evaluation saw: N images under K seeds. Tensors and arrays are accepted, arrays are kept.

    Args:
        targets: (N,) output index of the right class.
        top5_classes: (K, N, P) output indices, most probable first, P = min(5, number of classes).
        top5_probabilities: (K, N, P) their softmax probabilities.
        losses: (K, N) cross-entropy of each image, nats.

    Raises:
        ValueError: the shapes do not fit each other, or the indices are not integers.
        UserError: there are no images.
    """

    targets: NDArray[np.int64]
    top5_classes: NDArray[np.int64]
    top5_probabilities: NDArray[np.float64]
    losses: NDArray[np.float64]

    def __post_init__(self) -> None:
        self.targets = _numpy(self.targets, np.int64)
        self.top5_classes = _numpy(self.top5_classes, np.int64)
        self.top5_probabilities = _numpy(self.top5_probabilities, np.float64)
        self.losses = _numpy(self.losses, np.float64)
        shapes = [array.shape for array in (self.targets, self.top5_classes, self.top5_probabilities)]
        shapes.append(self.losses.shape)
        expected = "targets (N,), top5_classes and top5_probabilities (K, N, P), losses (K, N)"
        if [len(shape) for shape in shapes] != [1, 3, 3, 2]:
            raise ValueError(f"Records: expected {expected}, got {shapes}")
        draws, _, width = shapes[1]
        images = shapes[0][0]
        if shapes[1:] != [(draws, images, width), (draws, images, width), (draws, images)]:
            raise ValueError(f"Records: expected {expected}, got {shapes}")
        if draws == 0 or not 1 <= width <= MAX_PREDICTIONS:
            raise ValueError(f"Records: expected K >= 1 and 1 <= P <= {MAX_PREDICTIONS}, got {shapes[1]}")
        if images == 0:
            raise UserError("The evaluation saw no images. Check the data folder, the split and any batch limit.")


def summarise(records: Records) -> dict[str, Any]:
    """The accuracy figures of an evaluation, computed in double precision.

    Args:
        records: what the evaluation saw.

    Returns:
        The fields `top1`, `top5`, `loss`, `top1_per_seed` and `top1_std` of `Results`. With fewer than five
        classes every class is among the first five, and `top5` is 100. `top1_std` divides by K - 1; one seed
        has no deviation, and it is None.
    """
    hits = records.top5_classes == records.targets[None, :, None]  # [K, N, P]
    top1_per_seed = 100.0 * hits[:, :, 0].mean(axis=1, dtype=np.float64)
    top5_per_seed = 100.0 * hits.any(axis=2).mean(axis=1, dtype=np.float64)
    return {
        "top1": float(top1_per_seed.mean()),
        "top5": float(top5_per_seed.mean()),
        "loss": float(records.losses.mean(dtype=np.float64)),
        "top1_per_seed": [float(value) for value in top1_per_seed],
        "top1_std": float(top1_per_seed.std(ddof=1)) if len(top1_per_seed) > 1 else None,
    }


def _refuse_non_finite(value: object, name: str) -> None:
    """Raise a UserError that names the first NaN or infinity within `value`."""
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_non_finite(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_non_finite(item, f"{name}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"The network produced NaN or infinite values: {name} is {value}. "
            "Check the checkpoint, and evaluate with precision 32-true."
        )


def write_results(folder: str | os.PathLike[str], results: Results) -> Path:
    """Write `results.json`.

    Args:
        folder: the run's folder, which must exist.
        results: the figures.

    Returns:
        Path of the file.

    Raises:
        UserError: a figure is NaN or infinite, or the folder cannot be written to; no file is left then.
    """
    content = dataclasses.asdict(results)
    if results.skipped is None:
        del content["skipped"]
    _refuse_non_finite(content, "")
    path = Path(folder) / RESULTS_FILE
    write_json(path, content)
    return path


def read_json(path: str | os.PathLike[str], remedy: str) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Args:
        path: the file.
        remedy: what the user can do if it is missing or damaged, a sentence.

    Returns:
        The object.

    Raises:
        UserError: the file is missing, cannot be read, or is not such JSON.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except FileNotFoundError as error:
        raise UserError(f"{os.fspath(path)} does not exist. {remedy}") from error
    except OSError as error:
        raise UserError(f"{os.fspath(path)} cannot be read ({error.strerror}). {remedy}") from error
    except ValueError as error:  # wrong encoding and wrong JSON alike
        raise UserError(f"{os.fspath(path)} is damaged ({error}). {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{os.fspath(path)} is damaged (not a JSON object). {remedy}")
    return content


def read_results(folder: str | os.PathLike[str]) -> Results:
    """Read `results.json`.

    Args:
        folder: the run's folder.

    Returns:
        The figures; entries of the file that `Results` does not know are dropped.

    Raises:
        UserError: the file is missing, is not JSON, or lacks entries.
    """
    path = Path(folder) / RESULTS_FILE
    remedy = "Run the evaluation of this folder again."
    content = read_json(path, remedy)
    fields = dataclasses.fields(Results)
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in content]
    for name, keys in (
        ("checkpoint", CheckpointInfo.__annotations__),
        ("data", DataInfo.__annotations__),
    ):
        entry = content.get(name)
        if name in content:
            missing += [f"{name}.{key}" for key in keys if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}. {remedy}")
    for name in ("top1", "top5", "loss", "images_per_second"):
        if not isinstance(content[name], int | float):
            raise UserError(f"{path}: {name} must be a number, got {content[name]!r}. {remedy}")
    return Results(**{f.name: content[f.name] for f in fields if f.name in content})


def skipped_info(skipped: Mapping[str | os.PathLike[str], str]) -> SkippedInfo:
    """The images that were left out, as `results.json` has them.

    Args:
        skipped: path relative to the split's folder, to the reason.
    """
    reasons = {PurePosixPath(Path(path).as_posix()): reason for path, reason in skipped.items()}
    images = {name_for_json(path): reasons[path] for path in sorted(reasons, key=lambda path: path.parts)}
    return SkippedInfo(number=len(images), images=images)


def write_predictions(
    folder: str | os.PathLike[str], image_paths: Sequence[str | os.PathLike[str]], records: Records
) -> Path:
    """Write `predictions.csv`: one row per image, sorted by path, from the first seed.

    With fewer than five classes the remaining cells are empty. Probabilities have eight significant digits.

    Args:
        folder: the run's folder, which must exist.
        image_paths: N paths relative to the split's folder, in the order of `records`.
        records: what the evaluation saw.

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
                    int(records.targets[index]),
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
        targets: (N,) output index of the right class.
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
                    targets.append(int(row[1]))
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


def accuracy_text(mean: float, std: float | None, draws: int) -> str:
    """A percentage as shown in tables: `"81.69"`, or `"78.40 ± 0.35 (5 draws)"` over several draws."""
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f} ({draws} draws)"


def percent_text(fraction: float | None) -> str:
    """A fraction as shown in tables: 1/32 as `"3.1 %"`, 1 as `"100 %"`, None as `"-"`."""
    if fraction is None:
        return "-"
    percent = 100.0 * fraction
    return f"{percent:.0f} %" if percent >= 99.95 else f"{percent:.2g} %"


def results_table(results: Results, published: PublishedFigure | None) -> Table:
    """The table that ends one run, for `rich.print`: one line per figure.

    Args:
        results: the figures.
        published: what they are compared with, such as `results.published`; None leaves the line out.

    Returns:
        Table of two columns without header.
    """
    data = results.data
    number = f"{data['num_images']:,}" if results.complete else f"{results.num_evaluated:,} of {data['num_images']:,}"
    table = Table(title=f"{number} images of {data['split']}", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    if results.skipped is not None and results.skipped["number"]:
        table.add_row("left out", f"{results.skipped['number']:,} that cannot be decoded")
    table.add_row("model", results.model)
    table.add_row("attention", results.attention or "its own")
    top1 = accuracy_text(results.top1, results.top1_std, len(results.top1_per_seed))
    table.add_row("top-1", f"{top1} %" if results.top1_std is None else top1)
    if published is not None:
        difference = published.difference(results.top1)
        table.add_row("published top-1", f"{published.text} % ({difference:+.2f} here): {published.source}")
    table.add_row("top-5", f"{results.top5:.2f} %")
    table.add_row("loss", f"{results.loss:.4f}")
    table.add_row("images/s", f"{results.images_per_second:,.1f}")
    if results.attention_memory is not None:
        table.add_row("attention memory", f"{percent_text(results.attention_memory)} of full")
    return table
