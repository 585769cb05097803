"""WebDataset shards: tars in which `0001.jpg` is beside `0001.cls`, its class as text.

The package `webdataset` is not used: it streams shards, repeats or drops samples so that all processes get the same
number, and shuffles within a buffer. Here the headers are read once and images are read at their offsets, so each
counts exactly once on any number of processes.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from scatterbrain.errors import UserError
from src.datamodules.formats.archives import TarMember, members
from src.datamodules.formats.csv_file import parse_labels
from src.datamodules.formats.files import check_complete, files_matching, series
from src.datamodules.formats.location import FoundSplit, SplitLocation
from src.datamodules.formats.tar import TarListing, class_archives, holds_samples
from src.utils.text import abbreviate

FORMAT = "webdataset"
SEARCHED_NAMES = "*{split}*.tar or {folder}/*.tar with .jpg and .cls"
_IMAGES = ("jpg", "jpeg", "png")
_MAX_LABEL = 1 << 10


def find(location: SplitLocation) -> list[FoundSplit]:
    """Series of shards of the split."""
    word = re.compile(rf"(.*[^a-z0-9])?({'|'.join(map(re.escape, location.stems))})([^a-z].*)?\.tar")
    named = [path for path in location.named_files if path.suffix == ".tar"]
    if named:
        found = [tuple(named)] if len(named) > 1 or holds_samples(named[0]) else []
    else:
        found = series(
            files_matching(
                [location.data_dir], lambda name: word.fullmatch(name) and not name.startswith("ILSVRC2012_img")
            )
        )
        for folder in location.folders:
            if not class_archives(folder):
                found += series(files_matching([folder], lambda name: name.endswith(".tar")))
    # a single tar may hold images without .cls files, which is the format `tar`
    return [
        FoundSplit(FORMAT, files[0].parent if len(files) > 1 else files[0], files)
        for files in dict.fromkeys(found)
        if named or len(files) > 1 or holds_samples(files[0])
    ]


class WebDatasetListing(TarListing):
    """Images of WebDataset shards, in the order of the shards and their members."""

    format = FORMAT


def list_images(found: FoundSplit, location: SplitLocation, num_classes: int) -> WebDatasetListing:
    """List the samples of shards.

    Raises:
        UserError: a shard is damaged or missing, a sample lacks its image or class or comes twice, or see `Listing`.
    """
    if not location.named_files:
        check_complete(found.files, location.option)
    names, texts, sources = [], [], []
    for path in found.files:
        for image, label in _samples(path):
            names.append(f"{path.name}/{image.path}")
            texts.append(_text(label))
            sources.append(image)
    labels = parse_labels(texts, lambda index: f"the .cls of {sources[index]}") if texts else []
    return WebDatasetListing(found.root, names, labels, sources, num_classes, location.numbering)


def _samples(path: Path) -> list[tuple[TarMember, TarMember]]:
    """Image and class of each sample of a shard, in the order of the images."""
    images: dict[str, TarMember] = {}
    labels: dict[str, TarMember] = {}
    for member in members(path):
        # WebDataset's key is what comes before the first dot of the name
        key, _, suffix = member.name.partition(".")
        key, suffix = str(PurePosixPath(member.path).parent / key), suffix.lower()
        group = images if suffix in _IMAGES else labels if suffix == "cls" else None
        if group is None:
            continue
        if key in group:
            raise UserError(
                f"{path} has the sample '{key}' twice, or two images of it: {group[key].path} and {member.path}. Make "
                "the shard again."
            )
        group[key] = member
    for some, others, what in ((images, labels, "class (.cls)"), (labels, images, "image (.jpg, .jpeg, .png)")):
        missing = [key for key in some if key not in others]
        if missing:
            raise UserError(
                f"{path}: {len(missing)} samples lack their {what}: {abbreviate(missing, 3)}. Fetch or make the shard "
                "again."
            )
    if not images:
        raise UserError(f"{path} holds no samples of an image (.jpg, .jpeg, .png) and a class (.cls). Fetch it again.")
    return [(image, labels[key]) for key, image in images.items()]


def _text(label: TarMember) -> str:
    if label.size > _MAX_LABEL:
        raise UserError(f"{label} has {label.size} bytes, too many for a class label. Make the shard again.")
    return label.read_bytes().decode("utf-8", "replace").strip()
