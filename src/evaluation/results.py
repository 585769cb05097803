"""The results of one evaluation: `results.json`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from scatterbrain.errors import UserError
from src.evaluation.published import PublishedAccuracy, published_top1
from src.utils.files import name_for_json, write_json

RESULTS_FILE = "results.json"
ACCURACY = ("top1", "top5", "loss")  # what needs labels


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
        seeds: seeds of the random features.
        top1: top-1 accuracy, percent, mean over seeds; None where the images have no labels.
        top5: top-5 accuracy, percent, mean over seeds; None likewise.
        loss: cross-entropy, nats, mean over images and seeds; None likewise.
        top1_per_seed: top-1 accuracy of each seed, percent; empty without labels.
        top1_std: sample standard deviation of `top1_per_seed`, points; None with one seed.
        images_per_second: throughput: of the whole run, the loader included; in one pass with several attentions, of
            the device's work on this one. Of a run that was interrupted and resumed, that of its last part.
        peak_memory_mib: peak memory of the device, MiB; None on the CPU, and in one pass with several attentions.
        versions: version of Python and of each library that may change results.
        command: the command that was run.
        attention_options: options of the attention of both token stages; None where there is none.
        attention_memory: columns of the attention matrix that it takes over both token stages, as a fraction of all;
            None where that does not apply.
        attention_operations: its matrix-product operations over those of full attention, see `attention_cost`; None
            likewise, after an interruption, and in files of earlier versions.
        attention_peak_mib: peak memory of a call of it for one image, MiB; None likewise.
        seconds: how long the evaluation (its last part) took, as far as `images_per_second` counts it; None if not
            measured.
        random_features: where they come from: drawn from the `seeds`, or stored in the `checkpoint`, which was trained
            with them; None where there are none.
        fast: whether the inference model was evaluated, see `src.models.inference`.
        complete: whether all images (that can be decoded) were evaluated; false after an interruption, and all results
            are then those of the images so far.
        num_evaluated: number of images evaluated, of `data["num_images"]`; None in files of earlier versions, for all.
        compared: what else has to be the same for `eval.resume` to accept these results, by the options' names.
        one_pass: the fields of `OnePass` where several attentions were evaluated in one pass, else None.
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
    top1: float | None
    top5: float | None
    loss: float | None
    top1_per_seed: list[float]
    top1_std: float | None
    images_per_second: float
    peak_memory_mib: float | None
    versions: dict[str, str]
    command: str
    attention_options: list[dict[str, Any]] | None = None
    attention_memory: float | None = None
    attention_operations: float | None = None
    attention_peak_mib: float | None = None
    seconds: float | None = None
    random_features: str | None = None
    fast: bool = False
    complete: bool = True
    num_evaluated: int | None = None
    compared: dict[str, Any] | None = None
    one_pass: dict[str, Any] | None = None
    skipped: SkippedInfo | None = None

    @property
    def published(self) -> PublishedAccuracy | None:
        """The published top-1 of this very configuration on the whole ImageNet validation set, if any."""
        if not self.complete or self.top1 is None:
            return None
        return published_top1(
            self.model,
            self.attention,
            num_classes=self.data["num_classes"],
            image_size=self.image_size,
            num_images=self.data["num_images"],
        )


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
        results: to write.

    Returns:
        Path of the file.

    Raises:
        UserError: a result is NaN or infinite, or the folder cannot be written to; no file is left then.
    """
    content = dataclasses.asdict(results)
    for name in ("skipped", "compared", "one_pass"):
        if content[name] is None:
            del content[name]
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
    except (ValueError, RecursionError) as error:  # wrong encoding, wrong JSON and too deep JSON alike
        raise UserError(f"{os.fspath(path)} is damaged ({error}). {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{os.fspath(path)} is damaged (not a JSON object). {remedy}")
    return content


def read_results(folder: str | os.PathLike[str]) -> Results:
    """Read `results.json`.

    Args:
        folder: the run's folder.

    Returns:
        The results; entries of the file that `Results` does not know are dropped.

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
    labelled = any(content[name] is not None for name in ACCURACY)
    for name in (*ACCURACY, "images_per_second") if labelled else ("images_per_second",):
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
