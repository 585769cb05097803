"""Several runs side by side: what another attention costs in accuracy, and what it saves in time and memory."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scatterbrain.errors import UserError
from src.evaluation.predictions import Predictions, read_predictions
from src.evaluation.published import PublishedAccuracy
from src.evaluation.results import Results, read_results

logger = logging.getLogger(__name__)

# Left out of the overrides in a label, which begins with the attention.
_ATTENTION_OVERRIDE = "model/t2tattn_cfg"


@dataclass(frozen=True)
class ComparisonRow:
    """One run of a comparison, a line of `comparison.json`. The reference is the run with full attention.

    Args:
        run: name of the run's folder.
        label: attention, and what sets the run apart where another has the same attention.
        model: name of the variant.
        attention: name of the token stages' attention config; None for a model that keeps its own.
        num_seeds: number of seeds.
        top1: percent, mean over seeds; None where the images have no labels.
        top1_std: sample standard deviation over seeds, points; None with one seed or without labels.
        top1_difference: `top1` minus that of the reference, points; None without a reference or labels.
        top5: percent, mean over seeds; None without labels.
        loss: nats, mean over seeds; None without labels.
        agreement: percent of images whose first prediction (first seed) is the reference's; None without one.
        images_per_second: throughput.
        speedup: `images_per_second` over that of the reference; None without one of the same device, precision
            and `fast`.
        attention_memory: columns of the attention matrix, as a fraction of all; None where it does not apply.
        attention_operations: matrix-product operations of the attention over those of full attention; None likewise.
        attention_peak_mib: peak memory of a call of the attention for one image, MiB; None likewise.
        published: published top-1; None where there is none.
        num_images: number of images evaluated; without those that were skipped, since they could not be decoded.
    """

    run: str
    label: str
    model: str
    attention: str | None
    num_seeds: int
    top1: float | None
    top1_std: float | None
    top1_difference: float | None
    top5: float | None
    loss: float | None
    agreement: float | None
    images_per_second: float
    speedup: float | None
    attention_memory: float | None
    published: PublishedAccuracy | None
    num_images: int | None = None
    attention_operations: float | None = None
    attention_peak_mib: float | None = None

    @property
    def sampling_error(self) -> float | None:
        """Standard error of `top1` that the number of images gives, points; None where that is not known."""
        if not self.num_images or self.top1 is None:
            return None
        return (self.top1 * (100.0 - self.top1) / self.num_images) ** 0.5


@dataclass(frozen=True, kw_only=True)
class OnePass:
    """Duration and memory of one pass over the images with several attentions.

    Args:
        attentions: their number.
        forward_passes: of each image, over all attentions and seeds.
        seconds: duration of the pass, reading and decoding of the images included.
        peak_memory_mib: peak memory of the device, MiB; None on the CPU.
    """

    attentions: int
    forward_passes: int
    seconds: float
    peak_memory_mib: float | None

    def describe(self, num_images: int) -> str:
        """Duration and rate in words, without a full stop.

        Args:
            num_images: number of images of the pass.
        """
        memory = "" if self.peak_memory_mib is None else f", peak memory {self.peak_memory_mib:,.0f} MiB"
        number = f"{self.attentions} attention" + ("s" if self.attentions > 1 else "")
        return (
            f"one pass over {num_images:,} images with {number} "
            f"({self.forward_passes} forward passes of each image) took {self.seconds:,.1f} s, "
            f"{num_images / self.seconds:,.1f} images/s{memory}"
        )


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Args:
        common: the entries of `results.json` that all runs share, of model, checkpoint, data, image_size,
            precision, device and seeds.
        rows: one per run, in the order given.
        failed: names of runs that left no results, or results of a part of the images.
        one_pass: where the runs were one pass over the images; None where each had its own.
    """

    common: dict[str, Any]
    rows: list[ComparisonRow]
    failed: list[str] = field(default_factory=list)
    one_pass: OnePass | None = None

    @property
    def model_text(self) -> str:
        """Name of the model, or that there are several."""
        return str(self.common.get("model", "several models"))

    @property
    def unlabelled(self) -> bool:
        """Whether no run has an accuracy, since the images have no labels."""
        return all(row.top1 is None for row in self.rows)

    @property
    def conditions(self) -> list[str]:
        """What all runs share: images, checkpoint, device, precision."""
        common = self.common
        words = []
        if data := common.get("data"):
            words.append(f"{data['num_images']:,} images of {data['split']}")
        if image_size := common.get("image_size"):
            words.append(f"{image_size} px")
        if checkpoint := common.get("checkpoint"):
            name = Path(checkpoint["path"]).name if checkpoint["path"] else "none (untrained weights)"
            digest = f" (sha256 {checkpoint['sha256'][:8]})" if checkpoint["sha256"] else ""
            words.append(f"checkpoint {name}{digest}")
        words += [str(common[name]) for name in ("device", "precision") if name in common]
        return words


def compare_runs(
    run_folders: Sequence[str | os.PathLike[str]],
    failed: Sequence[str | os.PathLike[str]] = (),
    one_pass: OnePass | None = None,
) -> Comparison:
    """Compare finished runs; one that was interrupted is left out, and named among those that failed.

    A run's reference is the first run with attention `"full"` on the same model, weights, images and image
    size, one of the same device, precision and `fast` if there is any. Images are matched by name. Runs that skipped
    different numbers of images have no reference in each other, and a warning names them.

    Args:
        run_folders: folders that hold `results.json` and `predictions.csv`, in the order of the rows.
        failed: folders of runs that left none.
        one_pass: where the runs were one pass over the images.

    Returns:
        The comparison.

    Raises:
        UserError: no folders or finished runs, a file is missing or damaged, or two runs on the same data hold
            different images.
    """
    folders = [Path(folder) for folder in run_folders]
    if not folders:
        raise UserError("There is nothing to compare: no run left results. Run the evaluation first.")
    runs = [read_results(folder) for folder in folders]
    incomplete = [folder for folder, run in zip(folders, runs, strict=True) if not run.complete]
    if incomplete:
        names = ", ".join(map(str, incomplete))
        logger.warning("Left out of the comparison, since it was interrupted (eval.resume=true resumes it): %s", names)
        folders = [folder for folder in folders if folder not in incomplete]
        runs = [run for run in runs if run.complete]
        failed = [*failed, *incomplete]
        if not folders:
            raise UserError(f"There is nothing to compare: {names} was interrupted. Resume it with eval.resume=true.")
    labels = _labels(folders, runs)
    references = [_reference(index, runs) for index in range(len(runs))]
    _warn_of_unequal_images(folders, runs, references)
    # Only what is compared is read, and each file once.
    needed = {index for pair in enumerate(references) if pair[1] is not None for index in pair}
    predictions = {index: read_predictions(folders[index]) for index in sorted(needed)}

    rows = []
    for index, run in enumerate(runs):
        number = references[index]
        reference = None if number is None else runs[number]
        agreement = None
        if number is not None:
            same = count_same_predictions(folders[index], predictions[index], folders[number], predictions[number])
            agreement = 100.0 * same / len(predictions[index].images)
        comparable = reference is not None and _speed_key(reference) == _speed_key(run)
        rows.append(
            ComparisonRow(
                run=folders[index].name,
                label=labels[index],
                model=run.model,
                attention=run.attention,
                num_seeds=len(run.top1_per_seed or run.seeds),
                top1=run.top1,
                top1_std=run.top1_std,
                top1_difference=_difference(run.top1, None if reference is None else reference.top1),
                top5=run.top5,
                loss=run.loss,
                agreement=agreement,
                images_per_second=run.images_per_second,
                speedup=run.images_per_second / reference.images_per_second if comparable else None,
                attention_memory=run.attention_memory,
                published=run.published,
                num_images=run.data["num_images"],
                attention_operations=run.attention_operations,
                attention_peak_mib=run.attention_peak_mib,
            )
        )
    return Comparison(_common(runs), rows, [Path(folder).name for folder in failed], one_pass)


def _difference(top1: float | None, reference: float | None) -> float | None:
    return None if top1 is None or reference is None else top1 - reference


def _reference(index: int, runs: Sequence[Results]) -> int | None:
    """Number of the run with full attention that run `index` is compared with, or None."""
    run = runs[index]
    key = (run.model, run.checkpoint["sha256"], run.data, run.image_size)
    candidates = [
        number
        for number, other in enumerate(runs)
        if other.attention == "full" and (other.model, other.checkpoint["sha256"], other.data, other.image_size) == key
    ]
    return min(candidates, key=lambda number: _speed_key(runs[number]) != _speed_key(run), default=None)


def _warn_of_unequal_images(folders: Sequence[Path], runs: Sequence[Results], references: Sequence[int | None]) -> None:
    """Name the runs that have no reference only because other images of theirs could not be decoded."""
    for folder, run, reference in zip(folders, runs, references, strict=True):
        for other_folder, other in zip(folders, runs, strict=True):
            if (
                reference is None
                and other.attention == "full"
                and (other.model, other.checkpoint["sha256"], other.image_size)
                == (run.model, run.checkpoint["sha256"], run.image_size)
                and {**other.data, "num_images": None} == {**run.data, "num_images": None}
            ):
                logger.warning(
                    "%s is not compared with full attention: it evaluated %s images, and %s %s of the same data. Run "
                    "both on the same images.",
                    *(folder, f"{run.data['num_images']:,}", other_folder, f"{other.data['num_images']:,}"),
                )
                break


def _speed_key(run: Results) -> tuple[str, str, bool]:
    return run.device, run.precision, run.fast


def count_same_predictions(folder: Path, ours: Predictions, reference_folder: Path, theirs: Predictions) -> int:
    """Number of images with the same first prediction.

    Args:
        folder: of the run, for messages.
        ours: its predictions.
        reference_folder: of the other run, for messages.
        theirs: its predictions.

    Raises:
        UserError: the runs evaluated different images.
    """
    reference = dict(zip(theirs.images, theirs.classes[:, 0].tolist(), strict=True))
    if odd := set(ours.images) ^ reference.keys():
        raise UserError(
            f"{folder} and {reference_folder} evaluated different images of the same data: "
            f"{min(odd)} is in one of them only. Run both again on unchanged data."
        )
    return sum(reference[image] == label for image, label in zip(ours.images, ours.classes[:, 0].tolist(), strict=True))


def _common(runs: Sequence[Results]) -> dict[str, Any]:
    names = ("model", "checkpoint", "data", "image_size", "precision", "device", "seeds")
    first = runs[0]
    return {
        name: getattr(first, name) for name in names if all(getattr(run, name) == getattr(first, name) for run in runs)
    }


def _labels(folders: Sequence[Path], runs: Sequence[Results]) -> list[str]:
    """A different label for each run: the attention, then the settings in which equal ones differ."""
    base = [run.attention or run.model for run in runs]
    counts = Counter(base)
    settings = [_settings(folder, run) for folder, run in zip(folders, runs, strict=True)]
    labels = []
    for index, name in enumerate(base):
        if counts[name] == 1:
            labels.append(name)
            continue
        others = [settings[other] for other, other_name in enumerate(base) if other_name == name]
        differing = {
            key: value
            for key, value in settings[index].items()
            if any(other.get(key) != value for other in others) and value != name
        }
        # "trainer.precision" reads as "precision" as long as no other key ends the same way.
        short = Counter(re.split(r"[./]", key)[-1] for key in differing)
        words = []
        for key, value in differing.items():
            last = re.split(r"[./]", key)[-1]
            words.append(f"{last if short[last] == 1 else key}={value}")
        labels.append(", ".join([name, *words]))
    counts = Counter(labels)
    return [
        label if counts[label] == 1 else f"{label} (run {folder.name})"
        for label, folder in zip(labels, folders, strict=True)
    ]


def _settings(folder: Path, run: Results) -> dict[str, str]:
    """Settings of a run: the overrides that Hydra saved, or entries of the results where it saved none."""
    path = folder / ".hydra" / "overrides.yaml"
    if path.is_file():
        try:
            overrides = OmegaConf.to_container(OmegaConf.load(path))
        except (OSError, ValueError, OmegaConfBaseException):  # a label is not worth a failure
            overrides = []
        pairs = dict(str(item).lstrip("+~").partition("=")[::2] for item in overrides or [])
        for name in (_ATTENTION_OVERRIDE, "eval.resume"):
            pairs.pop(name, None)
        return pairs
    names = ("model", "image_size", "precision", "device", "seeds", "fast")
    settings = {name: str(getattr(run, name)) for name in names}
    settings["checkpoint"] = Path(run.checkpoint["path"] or "none").name
    return settings
