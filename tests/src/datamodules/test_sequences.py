"""Data of the trainings on sequences: ListOps against its rules, copies, text, and what the steps take."""

from __future__ import annotations

import math
import statistics
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scatterbrain.errors import UserError
from src.datamodules.sequences import listops
from src.datamodules.sequences.base import IGNORED, SequenceData, TextData
from src.datamodules.sequences.copying import SEPARATOR, chance_perplexity, read_copy
from src.datamodules.sequences.datamodule import SequenceDataModule
from src.datamodules.sequences.text import as_tensor, byte_after_byte, byte_frequencies, read_python_sources


@pytest.fixture(scope="module")
def expressions():
    return listops.draw_expressions(400, 200, seed=3)


# ListOps --------------------------------------------------------------------------------------------------------------


def evaluate(words):
    """Value of an expression and its depth, by its grammar; takes the words from the list."""
    word = words.pop(0)
    if not word.startswith("["):
        return int(word), 1
    arguments = []
    while words[0] != "]":
        arguments.append(evaluate(words))
    words.pop(0)
    assert 2 <= len(arguments) <= 10
    values = [value for value, _ in arguments]
    functions = {"[MIN": min, "[MAX": max, "[MED": lambda x: int(statistics.median(x)), "[SM": lambda x: sum(x) % 10}
    return functions[word](values), 1 + max(depth for _, depth in arguments)


def test_values_are_those_of_the_grammar(expressions):
    deepest = 0
    for tokens, length, value in zip(expressions.tokens, expressions.lengths, expressions.values, strict=True):
        words = listops.as_text(tokens).split()
        assert len(words) == length
        assert 100 <= length <= 200
        assert (tokens[length:] == listops.PADDING).all()
        found, depth = evaluate(words)
        assert not words
        assert found == value
        deepest = max(deepest, depth)
    assert deepest == listops.MAX_DEPTH


def test_expressions_are_a_function_of_their_seed_and_differ():
    one, again, more, other = (
        listops.draw_expressions(num, 64, seed) for num, seed in ((50, 1), (50, 1), (300, 1), (50, 2))
    )
    for name in ("tokens", "lengths", "values"):
        assert np.array_equal(getattr(one, name), getattr(again, name))
        assert np.array_equal(getattr(one, name), getattr(more[:50], name))
    assert not np.array_equal(one.tokens, other.tokens)
    # with four tokens, there are 400 of them, which come again and again
    short = listops.draw_expressions(300, 16, seed=0, shortest=4)
    assert len({tokens.tobytes() for tokens in short.tokens}) == len(short) == 300


def test_expressions_are_balanced():
    drawn = listops.draw_expressions(4000, 256, seed=5)
    shares = np.bincount(drawn.values, minlength=10) / len(drawn)
    # MIN and MAX of several digits favour 0 and 9; no value is rare
    assert shares.max() < 0.22
    assert shares.min() > 0.05
    # four standard errors of a quarter of 4,000 are 0.03; lengths that are wanted favour no operator by much
    outermost = np.bincount(drawn.tokens[:, 0], minlength=17)[11:15] / len(drawn)
    assert np.abs(outermost - 0.25).max() < 0.05
    # all lengths: each tenth of the range has its share
    counts = np.histogram(drawn.lengths, bins=8, range=(128, 256))[0]
    assert counts.min() > 200


def test_baselines_are_what_a_guess_gets():
    tokens = torch.tensor([[11], [11], [11], [12], [12]], dtype=torch.uint8)
    train = SequenceData(tokens, torch.tensor([0, 0, 3, 9, 9]))
    held_out = SequenceData(tokens[1:], torch.tensor([0, 0, 9, 1]))
    assert listops.first_operator_accuracy(train, held_out) == 0.75
    parts = {"train": train, "validation": held_out, "test": held_out}
    module = SequenceDataModule(lambda: parts, length=1, vocabulary=16, num_classes=10)
    module.setup()
    assert module.describe()["baselines"] == {"majority class": 0.5}


def test_expressions_that_are_not_there_are_refused(monkeypatch):
    small_expressions = listops.draw_expressions(3, 16, seed=0)
    with pytest.raises(UserError, match=r"length=8 is not valid"):
        listops.draw_expressions(5, 8, seed=0)
    monkeypatch.setattr(listops, "_draw", lambda *_: small_expressions)
    with pytest.raises(UserError, match=r"Only 3 different expressions of 8 to 16 tokens turn up, not 4\."):
        listops.draw_expressions(4, 16, seed=0)


def test_expressions_are_kept(tmp_path, monkeypatch):
    sizes = {"length": 32, "shortest": 8, "num_train": 30, "num_validation": 5, "num_test": 5}
    first = listops.read_listops(**sizes, cache=tmp_path / "new" / "listops.safetensors")
    assert [len(part) for part in first.values()] == [5, 5, 30]
    # more of them for training leaves the held-out ones as they are
    more = listops.read_listops(**sizes | {"num_train": 50})
    assert torch.equal(more["test"].tokens, first["test"].tokens)
    monkeypatch.setattr(listops, "draw_expressions", None)
    again = listops.read_listops(**sizes, cache=tmp_path / "new" / "listops.safetensors")
    for name, part in first.items():
        for field in ("tokens", "targets", "lengths"):
            assert torch.equal(getattr(part, field), getattr(again[name], field))
    with pytest.raises(UserError, match=r"listops\.safetensors was made of other files or options"):
        listops.read_listops(**sizes, cache=tmp_path / "new" / "listops.safetensors", seed=1)
    with pytest.raises(UserError, match=r"datamodule\.read\.seed=0\.5 is not valid"):
        listops.read_listops(**sizes, seed=0.5)


# Copies ---------------------------------------------------------------------------------------------------------------


def test_the_second_half_repeats_the_first():
    parts = read_copy(length=16, num_words=5, num_train=40, num_validation=3, num_test=2, seed=1)
    train = parts["train"]
    assert train.tokens.shape == (40, 16)
    assert torch.equal(train.tokens[:, :8], train.tokens[:, 8:])
    assert (train.tokens[:, 0] == SEPARATOR).all()
    words = train.tokens[:, 1:8]
    assert (words.min(), words.max()) == (1, 5)
    # each word of the second half is a target, at the token before it
    assert (train.targets[:, :8] == IGNORED).all()
    assert (train.targets[:, 15] == IGNORED).all()
    assert torch.equal(train.targets[:, 8:15], train.tokens[:, 9:].short())
    assert chance_perplexity(train, parts["test"]) == 5
    with pytest.raises(UserError, match=r"an even length \(got 15\)"):
        read_copy(length=15)
    for seed in ("a", 0.5, -1):
        with pytest.raises(UserError, match=rf"datamodule\.read\.seed={seed} is not valid"):
            read_copy(length=16, seed=seed)


# Text -----------------------------------------------------------------------------------------------------------------


def test_sources_are_split_by_file(tmp_path):
    (tmp_path / "pack" / "test").mkdir(parents=True)
    (tmp_path / "site-packages").mkdir()
    for name in ("pack/test/a.py", "site-packages/a.py", "_sysconfigdata_x.py", "a.txt"):
        (tmp_path / name).write_text("no")
    with pytest.raises(UserError, match=r"has 0 Python files"):
        read_python_sources(tmp_path)
    for number in range(24):
        (tmp_path / ("pack" if number % 2 else ".") / f"m{number:02}.py").write_text(f"<{number}>")
    data = read_python_sources(tmp_path)
    even, odd = range(0, 24, 2), range(1, 24, 2)
    order = [f"<{number}>" for number in (*even, *odd)]  # m*.py before pack/m*.py

    def text(part):
        return bytes(part.tolist()).decode()

    assert text(data.test) == "".join(order[9::10])
    assert text(data.validation) == "".join(order[4::10])
    expected = "".join(text for place, text in enumerate(order) if place % 5 != 4)
    assert text(data.train) == expected
    assert text(read_python_sources(tmp_path, limit=7).train) == "".join(order[:3])
    for limit in (0, "a"):
        with pytest.raises(UserError, match=rf"datamodule\.read\.limit={limit} is not valid"):
            read_python_sources(tmp_path, limit=limit)
    with pytest.raises(UserError, match=r"3 has 0 Python files.* Give another datamodule\.read\.data_dir"):
        read_python_sources(3)


def test_sources_are_there():
    data = read_python_sources()
    assert len(data.train) > 1_000_000
    assert min(len(data.validation), len(data.test)) > 50_000
    assert sum(map(len, (data.train, data.validation, data.test))) < 1.2 * 8_000_000


def test_bits_of_bytes():
    train, held_out = as_tensor(b"aaab"), as_tensor(b"ab")
    assert byte_frequencies(train, held_out) == pytest.approx(-(math.log2(4 / 260) + math.log2(2 / 260)) / 2)
    assert byte_after_byte(train, held_out) == pytest.approx(-math.log2(2 / (3 + 256)))  # aa, aa, ab


# The data module ------------------------------------------------------------------------------------------------------


def module_of(data, step=0, **options):
    """A data module whose trainer has done some steps."""
    options = {"length": 32, "vocabulary": 256, "num_classes": 256, "batch_size": 5, "eval_batch_size": 3} | options
    module = SequenceDataModule(lambda: data, **options)
    module.trainer = SimpleNamespace(global_step=step, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    module.setup()
    return module


@pytest.fixture
def text():
    one = as_tensor(bytes(range(32, 127)) * 8)
    return TextData(one, one.flip(0), one[:100])


@pytest.fixture
def sequences():
    parts = {}
    for name, size in (("train", 23), ("validation", 7), ("test", 4)):
        tokens = torch.arange(size, dtype=torch.uint8)[:, None].expand(size, 6)
        parts[name] = SequenceData(tokens, torch.arange(size), torch.arange(1, size + 1).clamp(max=6))
    return parts


def test_windows_lie_in_the_text_and_targets_are_the_next_bytes(text):
    module = module_of(text, batch_size=20, steps=500, eval_steps=500)
    starts = []
    for tokens, lengths, targets in module.train_dataloader():
        assert lengths is None
        assert tokens.dtype == targets.dtype == torch.long
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        assert torch.equal((targets - tokens) % 95, torch.ones_like(tokens))
        starts += tokens[:, 0].tolist()
    assert (min(starts), max(starts), len(starts)) == (32, 126, 500 * 20)
    order = module._order(0, 500)
    assert (order.min(), order.max()) == (0, 8 * 95 - 32 - 1)
    # those of an evaluation are side by side, and spread where there are fewer
    assert module.num_evaluated("validation") == (8 * 95 - 1) // 32 == 23
    every = torch.cat([tokens for tokens, _, _ in module.val_dataloader()])
    assert torch.equal(every.flatten(), text.validation[: 23 * 32].long())
    some = torch.cat([tokens for tokens, _, _ in module_of(text, eval_windows=4).val_dataloader()])
    assert torch.equal(some, every[[2, 8, 14, 20]])
    assert module.each_token
    assert module.describe() | {"sha256": 0} == {
        **{"num_train": 760, "num_validation": 760, "num_test": 100, "unit": "bytes"},
        **{"baselines": {}, "sha256": 0},
    }


def test_each_sequence_comes_once_in_a_pass_and_a_resumed_training_sees_the_rest(sequences):
    order = module_of(sequences, steps=23, eval_steps=23)._order(0, 23).flatten()
    for part in order.view(5, 23):
        assert torch.equal(part.sort().values, torch.arange(23))
    assert not torch.equal(order[:23], order[23:46])
    assert not torch.equal(module_of(sequences, seed=1)._order(0, 23).flatten(), order)
    for step, number, length in ((0, 4, 4), (6, 2, 4), (8, 1, 1)):
        batches = module_of(sequences, step, steps=9, eval_steps=4).train_dataloader()
        assert len(batches) == length
        taken = torch.cat([tokens[:, 0] for tokens, _, _ in batches])
        assert torch.equal(taken, order[5 * step : 5 * (step + number)])


def test_the_order_of_windows_does_not_depend_on_where_it_begins(text):
    module = module_of(text)
    whole = module._order(0, 50)
    assert torch.equal(module._order(30, 50), whole[30:])
    assert torch.equal(module._order(0, 20), whole[:20])


def test_sequences_come_with_their_lengths_and_classes(sequences):
    module = module_of(sequences)
    tokens, lengths, targets = (torch.cat(parts) for parts in zip(*module.test_dataloader(), strict=True))
    assert torch.equal(tokens[:, 0], targets)
    assert torch.equal(targets, torch.arange(4))
    assert torch.equal(lengths, torch.arange(1, 5))
    # the validation part may be larger than an evaluation needs
    (batch,) = module_of(sequences, validation_samples=3).val_dataloader()
    assert batch[2].tolist() == [1, 3, 5]
    assert not module.each_token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 5}, r"Sequences for train have 6 tokens\. Give datamodule\.length=6 or more\."),
        (
            {"vocabulary": 22},
            r"datamodule\.vocabulary=22, but the part for train has the number 22\. Give at least 23\.",
        ),
        ({"num_classes": 20}, r"datamodule\.num_classes=20, but the part for train has the number 22"),
        ({"metric": "accurcy"}, r"datamodule\.metric=accurcy is unknown\. Did you mean.*accuracy"),
        ({"batch_size": 0}, r"datamodule\.batch_size=0 is not valid"),
        ({"eval_windows": 0}, r"datamodule\.eval_windows=0 is not valid"),
    ],
)
def test_what_does_not_fit_is_refused(sequences, options, message):
    with pytest.raises(UserError, match=message):
        module_of(sequences, **options)


def test_texts_that_are_too_short_are_refused(text):
    with pytest.raises(UserError, match=r"The text for test has 100 bytes, too few for a window of .*length=100"):
        module_of(text, length=100)


def test_another_text_has_another_digest(text):
    other = TextData(text.train, text.validation, text.test + 1)
    assert module_of(text).describe()["sha256"] != module_of(other).describe()["sha256"]


def test_baselines_of_the_config(text):
    module = SequenceDataModule(
        lambda: text, length=32, vocabulary=256, num_classes=256, baselines={"pairs": partial(byte_after_byte)}
    )
    module.setup()
    assert module.describe()["baselines"] == {"pairs": byte_after_byte(text.train, text.test)}
