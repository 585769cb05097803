"""WebDataset shards: tars in which `0001.jpg` is beside `0001.cls`, its class as a text.

The package `webdataset` is not used: it streams shards, repeats or drops samples so that processes get equally many,
and shuffles within a buffer. Here the headers are read once and images are read from their places, so each counts
exactly once on any number of processes.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from scatterbrain.errors import UserError
from src.datamodules.layouts.archives import Member, members
from src.datamodules.layouts.base import Found, Place, check_complete, files_matching, listing, series
from src.datamodules.layouts.csv_file import parse_labels
from src.datamodules.layouts.tar import Archives, class_archives, holds_samples

FORMAT = "webdataset"
LOOKED_FOR = "*{split}*.tar or {folder}/*.tar with .jpg and .cls"
_IMAGES = ("jpg", "jpeg", "png")
_MAX_LABEL = 1 << 10


def find(place: Place) -> list[Found]:
    """Series of shards of the split."""
    word = re.compile(rf"(.*[^a-z0-9])?({'|'.join(map(re.escape, place.stems))})([^a-z].*)?\.tar")
    named = [path for path in place.named_files if path.suffix == ".tar"]
    if named:
        found = [tuple(named)] if len(named) > 1 or holds_samples(named[0]) else []
    else:
        found = series(
            files_matching(
                [place.data_dir], lambda name: word.fullmatch(name) and not name.startswith("ILSVRC2012_img")
            )
        )
        for folder in place.folders:
            if not class_archives(folder):
                found += series(files_matching([folder], lambda name: name.endswith(".tar")))
    # a tar by itself may be one of images alone, and of two kinds of tars only shards are shards
    return [
        Found(FORMAT, files[0].parent if len(files) > 1 else files[0], files)
        for files in dict.fromkeys(found)
        if named or len(files) > 1 or holds_samples(files[0])
    ]


class Shards(Archives):
    """Images of WebDataset shards, in the order of the shards and their members."""

    format = FORMAT


def open_layout(found: Found, place: Place, num_classes: int) -> Shards:
    """List the samples of shards.

    Raises:
        UserError: a shard is damaged or missing, a sample lacks its image or class or comes twice, or see `Listing`.
    """
    if not place.named_files:
        check_complete(found.files, place.option)
    names, texts, sources = [], [], []
    for path in found.files:
        for image, label in _samples(path):
            names.append(f"{path.name}/{image.path}")
            texts.append(_text(label))
            sources.append(image)
    labels = parse_labels(texts, lambda index: f"the .cls of {sources[index]}") if texts else []
    return Shards(found.root, names, labels, sources, num_classes)


def _samples(path: Path) -> list[tuple[Member, Member]]:
    """Image and class of each sample of a shard, in the order of the images."""
    images: dict[str, Member] = {}
    labels: dict[str, Member] = {}
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
        lacking = [key for key in some if key not in others]
        if lacking:
            raise UserError(
                f"{path}: {len(lacking)} samples lack their {what}: {listing(lacking, 3)}. Fetch or make the shard "
                "again."
            )
    if not images:
        raise UserError(f"{path} holds no samples of an image (.jpg, .jpeg, .png) and a class (.cls). Fetch it again.")
    return [(image, labels[key]) for key, image in images.items()]


def _text(label: Member) -> str:
    if label.size > _MAX_LABEL:
        raise UserError(f"{label} has {label.size} bytes, too many for a class. Make the shard again.")
    return label.read_bytes().decode("utf-8", "replace").strip()
