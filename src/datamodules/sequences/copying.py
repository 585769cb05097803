"""The copy task: `0 w 0 w`, where the second half repeats the random words of the first.

Kitaev et al., "Reformer", ICLR 2020, section 5: 127 different words, 511 of them at a length of 1,024. A causal network
predicts the second `w`, each word from all tokens before it; chance gives a perplexity of 127.
"""

from __future__ import annotations

import torch

from scatterbrain.errors import UserError, check_whole_number
from src.datamodules.sequences.base import IGNORED, SequenceData

SEPARATOR = 0
MAX_WORDS = 255  # tokens are bytes


def read_copy(
    length: int = 1024,
    num_words: int = 127,
    num_train: int = 16_384,
    num_validation: int = 256,
    num_test: int = 256,
    seed: int = 0,
) -> dict[str, SequenceData]:
    """The three parts of the copy task; targets are the next tokens of the second half, all others `IGNORED`.

    Args:
        length: tokens N of a sequence, even.
        num_words: different words, up to 255; the vocabulary has one token more.
        num_train: sequences for training.
        num_validation: sequences for validation.
        num_test: sequences for the test.
        seed: of the sequences; the same for every seed of a training.

    Raises:
        UserError: a value out of range.
    """
    check_whole_number("length", length, 4)
    check_whole_number("num_words", num_words, 2)
    check_whole_number("datamodule.read.seed", seed, 0)
    if length % 2 or num_words > MAX_WORDS:
        raise UserError(
            f"The copy task takes an even length (got {length}) and at most {MAX_WORDS} words (got {num_words})."
        )
    parts = {}
    generator = torch.Generator().manual_seed(seed)
    # training last: more of it leaves the held-out sequences as they are
    for name, size in {"test": num_test, "validation": num_validation, "train": num_train}.items():
        check_whole_number(f"num_{name}", size, 1)
        words = torch.randint(1, num_words + 1, (size, length // 2), generator=generator, dtype=torch.uint8)
        words[:, 0] = SEPARATOR
        targets = torch.full((size, length), IGNORED, dtype=torch.int16)
        targets[:, length // 2 : -1] = words[:, 1:]
        parts[name] = SequenceData(torch.cat([words, words], dim=1), targets)
    return parts


def chance_perplexity(train: SequenceData, held_out: SequenceData) -> float:
    """Perplexity of predicting every word with the same probability."""
    return float(train.tokens.max())
