"""Reviews of films by byte, positive or negative.

Maas et al., "Learning Word Vectors for Sentiment Analysis", ACL 2011, as in the Text task of Tay et al., "Long Range
Arena", ICLR 2021. Folders as in the published archive:

    aclImdb/
      train/  pos/0_9.txt ...  neg/...      12,500 reviews each
      test/   pos/...          neg/...      12,500 reviews each

Copies that keep a part of the training reviews in a third folder val/ are read too: those are training reviews.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from scatterbrain.errors import UserError, check_whole_number
from src.datamodules.sampling import hold_out
from src.datamodules.sequences.base import SequenceData
from src.datamodules.sequences.folders import (
    check_holdout,
    find_root,
    list_class,
    read_all,
    read_folders,
    read_text,
    warn_if_incomplete,
)

CLASSES = ("neg", "pos")
COMPLETE = {"train": 25_000, "test": 25_000}
LAYOUT = "train/ and test/, each with pos/ and neg/,"


def read_imdb(
    data_dir: str | os.PathLike[str] | None,
    length: int = 4000,
    holdout: float = 0.1,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
) -> dict[str, SequenceData]:
    """The three parts of the reviews: their first bytes, padded with 0, and 1 for positive, 0 for negative.

    Args:
        data_dir: folder of the reviews, or the folder that holds it as aclImdb/; None where `cache` exists.
        length: most bytes N of a review; the rest is cut off.
        holdout: part of the training reviews, of each class, that is for validation. The Long Range Arena validates on
            the test reviews and trains on all others.
        seed: of the choice of `holdout`.
        cache: file with all reviews, which is read in place of the folders, and written where it does not exist.

    Raises:
        UserError: an option, a folder or class without reviews, an empty or unreadable review, or see `read_folders`.
    """
    check_whole_number("datamodule.read.length", length, 1)
    check_holdout(holdout)
    check_whole_number("datamodule.read.seed", seed, 0)
    tensors = read_folders("imdb", "reviews", data_dir, cache, list_reviews, _read)
    parts = {}
    for part in COMPLETE:
        tokens, lengths = _pad(tensors[f"{part}.bytes"].numpy(), tensors[f"{part}.offsets"].numpy(), length)
        parts[part] = SequenceData(tokens, tensors[f"{part}.targets"].long(), lengths)
    warn_if_incomplete(cache if data_dir is None else data_dir, {part: len(parts[part]) for part in parts}, COMPLETE)
    train = parts["train"]
    for name, kept in zip(("train", "validation"), hold_out(train.targets.tolist(), holdout, seed), strict=True):
        parts[name] = SequenceData(train.tokens[kept], train.targets[kept], train.lengths[kept])
    return parts


def list_reviews(data_dir: str | os.PathLike[str]) -> dict[tuple[str, str], list[Path]]:
    """Files of the reviews by part (train or test) and class, sorted by name.

    Raises:
        UserError: a folder is missing or empty.
    """
    root = find_root(data_dir, "aclImdb", COMPLETE, LAYOUT)
    files = {(part, name): list_class(root / part / name, (".txt",)) for part in COMPLETE for name in CLASSES}
    if (root / "val").is_dir():
        for name in CLASSES:
            more = list_class(root / "val" / name, (".txt",))
            files["train", name] = sorted(files["train", name] + more, key=lambda path: path.name)
    return files


def _read(files: dict[tuple[str, str], list[Path]]) -> dict[str, torch.Tensor]:
    """All bytes of each part in a row, where each review begins and the last one ends, and classes."""
    texts = iter(read_all([path for paths in files.values() for path in paths], _read_review, "reviews"))
    tensors = {}
    for part in COMPLETE:
        sizes = [len(files[part, name]) for name in CLASSES]
        mine = [next(texts) for _ in range(sum(sizes))]
        tensors[f"{part}.bytes"] = torch.frombuffer(bytearray(b"".join(mine)), dtype=torch.uint8)
        tensors[f"{part}.offsets"] = torch.tensor([0, *map(len, mine)]).cumsum(0)
        tensors[f"{part}.targets"] = torch.arange(len(CLASSES)).repeat_interleave(torch.tensor(sizes)).to(torch.uint8)
    return tensors


def _read_review(path: Path) -> bytes:
    text = read_text(path)
    if not text:
        raise UserError(f"{path} is empty. Replace or remove the file.")
    return text


def _pad(text: np.ndarray, offsets: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first bytes (N, length) of each review, padded with 0, and their lengths (N,)."""
    lengths = np.minimum(np.diff(offsets), length)
    tokens = np.zeros((len(lengths), length), dtype=np.uint8)
    for row, start, size in zip(tokens, offsets[:-1].tolist(), lengths.tolist(), strict=True):
        row[:size] = text[start : start + size]
    return torch.from_numpy(tokens), torch.from_numpy(lengths)
