"""What a data source of sequences returns: a function `read_NAME(...)` that `configs/datamodule/NAME.yaml` names.

A source of sequences with classes returns `{"train": SequenceData, "validation": ..., "test": ...}`, a source of text a
`TextData`. The vocabulary size and the number of classes are options of the config, beside the function:

    _target_: src.datamodules.sequences.datamodule.SequenceDataModule
    read:
      _target_: src.datamodules.sequences.NAME.read_NAME
      _partial_: true
      data_dir: ${paths.data_dir}
    vocabulary: 256
    num_classes: 2

A source checks the files that it finds, raises `UserError` where they do not fit, and downloads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Target of a token that is not scored.
IGNORED = -1
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class SequenceData:
    """Sequences of one part of a data set, in memory.

    Attributes:
        tokens: (N, T) uint8 or int16 on the CPU, below the vocabulary size, padded at the end with any token.
        targets: (N,) classes as int64, one for each sequence; or (N, T) int16, one for each token, `IGNORED` where a
            token is not scored.
        lengths: (N,) int64, tokens without the padding, from 1 to T; None where no sequence is padded.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class TextData:
    """A text in three parts, whose next bytes are to be predicted: each (N,) uint8 on the CPU."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor
