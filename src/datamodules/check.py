"""Checks of a copy of ImageNet, or of other images: labels, numbers, and images that are corrupt or odd."""

from __future__ import annotations

import functools
import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from timm.data import RealLabelsImagenet

from scatterbrain.errors import UserError
from src.datamodules.dataset import ImageError, load_rgb
from src.datamodules.formats import Listing, SplitLocation, find_formats, imagenet_synsets
from src.datamodules.formats.labels import synset_in_name
from src.datamodules.formats.listing import read_source
from src.datamodules.image_folder import ImageFolderDataModule
from src.utils.files import write_json
from src.utils.progress import progress_display
from src.utils.text import abbreviate

# Images of ImageNet-1k, and those of each class of the validation set.
COMPLETE = {"train": 1_281_167, "val": 50_000}
VALIDATION_PER_CLASS = 50
# Right labels agree with the ReaL labels in nine cases out of ten, shuffled ones in one of a thousand.
MIN_AGREEMENT = 0.6
RIGHT_AGREEMENT = 0.9
# Of so few images, right labels may agree less by chance.
FEW_IMAGES = 50
CHANCE = 1e-6
# What the messages of the data module name, and the options of the tool.
_OPTIONS = {
    "datamodule.data_dir": "DIR",
    "datamodule.test_split": "--split",
    "datamodule.format": "--format",
    "datamodule.labels": "--labels",
    "datamodule.class_order": "--class-order",
    "model.num_classes": "--num-classes",
    " (or DATA_DIR in the file .env)": "",
}
_EXIF_ORIENTATION = 0x0112
_MAX_EXAMPLES = 20
_SUFFIXES = {".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG"}


def open_listing(data_dir: str, split: str, **options: Any) -> Listing:
    """The split as an evaluation would read it; `options` are those of the data module.

    Raises:
        UserError: as the data module, with the names of this tool's options.
    """
    try:
        module = ImageFolderDataModule(data_dir, test_split=split, num_workers=0, **options)
        module.setup("test")
    except UserError as error:
        message = str(error)
        for name, option in _OPTIONS.items():
            message = message.replace(f"{name}=", f"{option} ").replace(name, option)
        raise UserError(message) from error
    return module.test_dataset.listing


def look_at(images: Listing, position: int, decode: bool) -> tuple[str | None, list[str]]:
    """The fault of an image, None where it is not corrupt, and its oddities."""
    source = images.source(position)
    try:
        data = read_source(source)
    except (UserError, OSError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}", []
    if not data:
        return "zero bytes", []
    odd = []
    try:
        with Image.open(io.BytesIO(data)) as image:
            expected = _SUFFIXES.get(PurePosixPath(images.names[position]).suffix.lower())
            if expected and image.format != expected:
                odd.append(f"{image.format} in {PurePosixPath(images.names[position]).suffix}")
            if image.mode in ("L", "LA", "I;16", "I;16B", "I", "F", "1"):
                odd.append("grayscale")
            elif image.mode != "RGB":
                odd.append(image.mode)
            # cameras and web sites append data behind the end mark: it may be anywhere in the last 64 KiB
            end = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(image.format)
            if end is not None and end not in data[-(1 << 16) :]:
                return "truncated", odd
            if image.getexif().get(_EXIF_ORIENTATION, 1) not in (0, 1):
                odd.append("EXIF orientation")
    except Exception as error:  # Pillow raises nearly anything on damaged input
        unknown = isinstance(error, UnidentifiedImageError)
        return "not an image of a known format" if unknown else (str(error) or type(error).__name__).splitlines()[
            0
        ], odd
    if decode:
        try:
            load_rgb(source)
        except ImageError as error:
            return error.reason, odd
        except UserError as error:
            return str(error).removeprefix(f"Cannot decode the image {source}: ").rsplit(". ", 1)[0], odd
    return None, odd


@functools.cache
def real_labels() -> dict[str, list[int]]:
    """Classes that each validation image shows, by its name: none, one or several."""
    names = [f"ILSVRC2012_val_{number:08}.JPEG" for number in range(1, COMPLETE["val"] + 1)]
    return RealLabelsImagenet(names).real_labels


def check_labels(images: Listing) -> dict[str, Any]:
    """Agreement of the labels with ReaL labels of validation images, and with synsets in names."""
    classes = {index: name for name, index in images.class_to_index.items()}
    real = real_labels()
    compared = agreeing = 0
    contradictions = []
    for name, target in zip(images.names, images.targets, strict=True):
        number = re.search(r"ILSVRC2012_val_(\d{8})", PurePosixPath(name).name)
        known = real.get(f"ILSVRC2012_val_{number[1]}.JPEG") if number else None
        if known and classes[target] in imagenet_synsets():
            compared += 1
            agreeing += imagenet_synsets()[classes[target]] in known
        synset = synset_in_name(name)
        if synset is not None and classes[target] in imagenet_synsets() and synset != classes[target]:
            contradictions.append(f"{name} as {classes[target]}")
    return {
        "compared_with_real": compared,
        "agreement_with_real": agreeing / compared if compared else None,
        "contradicted_by_name": len(contradictions),
        "contradictions": contradictions[:_MAX_EXAMPLES],
    }


def in_wrong_order(labels: dict[str, Any]) -> bool:
    """Whether labels agree with the ReaL labels less than right ones would by chance; see `check_labels`."""
    number, agreement = labels["compared_with_real"], labels["agreement_with_real"]
    if not number or agreement >= MIN_AGREEMENT:
        return False
    return number >= FEW_IMAGES or _binomial_tail(round(agreement * number), number) < CHANCE


def _binomial_tail(agreeing: int, number: int) -> float:
    """Probability that no more than `agreeing` of a number of right labels agree."""
    hit, miss = RIGHT_AGREEMENT, 1 - RIGHT_AGREEMENT
    return sum(math.comb(number, k) * hit**k * miss ** (number - k) for k in range(agreeing + 1))


def check_split(images: Listing, split: str, subset: bool, decode: bool, jobs: int) -> dict[str, Any]:
    """The report on one split; `check` says what the options are."""
    counts = Counter(images.targets)
    is_imagenet = all(imagenet_synsets().get(name) == index for name, index in images.class_to_index.items())
    classes = imagenet_synsets() if is_imagenet else images.class_to_index
    per_class = {name: counts.get(index, 0) for name, index in classes.items()}
    missing = [name for name, number in per_class.items() if number == 0]
    corrupt: dict[str, str] = {}
    odd: dict[str, list[str]] = {}
    with progress_display(Console(stderr=True)) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task(f"images of {split}", total=len(images))
        # in pieces: a million results waiting would fill the memory
        for begin in range(0, len(images), 1024):
            positions = range(begin, min(begin + 1024, len(images)))
            found = pool.map(lambda position: look_at(images, position, decode), positions)
            for position, (fault, oddities) in zip(positions, found, strict=True):
                progress.advance(task)
                if fault is not None:
                    corrupt[images.names[position]] = fault
                for oddity in oddities:
                    odd.setdefault(oddity, []).append(images.names[position])
    labels = check_labels(images)

    wrong = []
    if corrupt:
        wrong.append(f"{len(corrupt)} corrupt images")
    if labels["contradicted_by_name"]:
        wrong.append(f"{labels['contradicted_by_name']} labels that contradict the image's name")
    if in_wrong_order(labels):
        wrong.append(f"labels in a wrong order: {labels['agreement_with_real']:.0%} agree with the ReaL labels")
    if not is_imagenet and missing:
        wrong.append(f"{len(missing)} classes without images: {abbreviate(missing)}")
    if is_imagenet and not subset:
        if missing:
            wrong.append(f"{len(missing)} of 1000 classes are missing: {abbreviate(missing)}")
        expected = COMPLETE.get("val" if split.startswith("val") else split)
        if expected is not None and len(images) != expected:
            wrong.append(f"{len(images):,} images, where ImageNet has {expected:,}")
        uneven = [name for name, number in per_class.items() if number not in (0, VALIDATION_PER_CLASS)]
        if split.startswith("val") and uneven:
            wrong.append(f"{len(uneven)} classes have not {VALIDATION_PER_CLASS} images: {abbreviate(uneven)}")
    present = [number for number in per_class.values() if number]
    return {
        "split": split,
        "format": images.format,
        "root": str(images.root),
        "num_images": len(images),
        "num_classes": len(present),
        "images_per_class": {"min": min(present), "max": max(present)},
        "missing_classes": missing,
        "per_class": per_class,
        "labels": labels,
        "corrupt": corrupt,
        "odd": {name: {"number": len(names), "examples": names[:_MAX_EXAMPLES]} for name, names in sorted(odd.items())},
        "wrong": wrong,
    }


def summary(report: dict[str, Any], decoded: bool) -> Table:
    """Table of the report on one split."""
    table = Table(title=escape(f"{report['split']}: {report['format']}, {report['root']}"), title_justify="left")
    table.add_column("check")
    table.add_column("result", overflow="fold")
    labels, counts = report["labels"], report["images_per_class"]
    table.add_row("images", f"{report['num_images']:,}")
    table.add_row("classes", f"{report['num_classes']:,}, {len(report['missing_classes'])} missing")
    table.add_row("images per class", f"{counts['min']} to {counts['max']}")
    if labels["compared_with_real"]:
        agreement = f"{labels['agreement_with_real']:.1%} of {labels['compared_with_real']:,}"
        if labels["compared_with_real"] < FEW_IMAGES and not in_wrong_order(labels):
            agreement += " (too few to judge)"
        table.add_row("labels among the ReaL labels", agreement)
    table.add_row("labels that contradict names", str(labels["contradicted_by_name"]))
    corrupt = [f"{name}: {fault}" for name, fault in report["corrupt"].items()]
    table.add_row("corrupt" if decoded else "corrupt (headers)", escape(abbreviate(corrupt, 3) if corrupt else "0"))
    for name, odd in report["odd"].items():
        table.add_row(escape(f"odd: {name}"), escape(f"{odd['number']:,}, such as {odd['examples'][0]}"))
    table.add_row("wrong", escape("; ".join(report["wrong"]) or "nothing"))
    return table


def check(
    data_dir: str,
    split: Sequence[str] | None,
    format: str,
    num_classes: int,
    class_order: str,
    labels: str,
    subset: bool,
    decode: bool,
    jobs: int,
    output: str | None,
) -> int:
    """Check every split, print a table for each and write the report; 1 if anything is wrong, else 0.

    Args:
        data_dir: folder that holds the splits.
        split: names; None is `val`, and `train` where it is there.
        format: of the data, one of `FORMATS`.
        num_classes: outputs of the model.
        class_order: order in which the classes are numbered, see `ClassNumbering`.
        labels: indices of classes named after ImageNet-1k synsets, see `ClassNumbering`.
        subset: accept that ImageNet is not complete.
        decode: decode the images, in place of reading their headers.
        jobs: number of threads.
        output: file of the report as JSON; None for none.

    Raises:
        UserError: a split cannot be listed, or the report cannot be written.
    """
    splits = list(dict.fromkeys(split or ["val"]))
    folder = Path(data_dir).expanduser().absolute()
    if split is None and folder.is_dir() and find_formats(SplitLocation(folder, "train"), format):
        splits.append("train")
    options = {"format": format, "num_classes": num_classes, "class_order": class_order, "labels": labels}
    reports = []
    for name in splits:
        images = open_listing(data_dir, name, **options)
        reports.append(check_split(images, name, subset, decode, jobs))
        Console().print(summary(reports[-1], decode))
    if output is not None:
        write_json(output, {"data_dir": str(folder), "decoded": decode, "splits": reports})
        Console().print(f"Written to {output}.", markup=False, highlight=False, soft_wrap=True)
    return int(any(report["wrong"] for report in reports))
