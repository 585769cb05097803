"""The table of all images: contents, dtypes, and that a wrong number of images is never silent."""

from __future__ import annotations

import pytest
import torch

from src.tasks.image_records import ImageRecords


def test_rows_hold_what_softmax_and_cross_entropy_give():
    logits = torch.randn(2, 6, 7, dtype=torch.float64)
    targets = torch.tensor([0, 6, 3, 3, 1, 5])
    records = ImageRecords(6, 7, num_seeds=2, dtype=torch.float64)
    for draw in range(2):
        for rows in (torch.tensor([4, 0, 2]), torch.tensor([1, 5, 3])):
            records.update(draw, rows, logits[draw, rows], targets[rows])
    result = records.compute()

    exponentials = logits.exp()
    probabilities = exponentials / exponentials.sum(-1, keepdim=True)
    order = probabilities.argsort(-1, descending=True)[..., :5]
    assert result.targets.tolist() == targets.tolist()
    assert result.top5_classes.tolist() == order.tolist()
    torch.testing.assert_close(torch.from_numpy(result.top5_probabilities), probabilities.gather(-1, order))
    losses = -probabilities[:, torch.arange(6), targets].log()
    torch.testing.assert_close(torch.from_numpy(result.losses), losses)


def test_half_precision_logits_are_computed_in_float32():
    logits = torch.randn(3, 5).bfloat16()
    records = ImageRecords(3, 5)
    records.update(0, torch.arange(3), logits, torch.zeros(3, dtype=torch.long))
    expected = logits.float().softmax(-1).sort(-1, descending=True).values
    assert torch.equal(records.top5_probabilities[0], expected)


def test_fewer_classes_than_five():
    records = ImageRecords(2, 3)
    records.update(0, torch.arange(2), torch.randn(2, 3), torch.tensor([0, 2]))
    assert records.compute().top5_classes.shape == (1, 2, 3)


@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 2, 2]])
def test_an_image_missed_or_counted_twice_is_an_error(rows):
    records = ImageRecords(3, 5)
    for row in rows:
        records.update(0, torch.tensor([row]), torch.randn(1, 5), torch.tensor([0]))
    with pytest.raises(RuntimeError, match=r"1 of 3 images .* number 2: \[[02]\] times"):
        records.compute()


def test_accuracy_so_far_counts_the_rows_there_are():
    records = ImageRecords(4, 3, num_seeds=2)
    rows = torch.tensor([2, 0])
    best = torch.tensor([[9.0, 1, 2], [1.0, 9, 2]])  # classes 0 and 1
    records.update(0, rows, best, torch.tensor([0, 0]))
    assert float(records.top1_so_far()) == 50
    records.update(1, rows, best.flip(0), torch.tensor([0, 0]))
    assert float(records.top1_so_far()) == 50
    records.update(0, torch.tensor([1]), best[1:], torch.tensor([1]))
    records.update(1, torch.tensor([1]), best[1:], torch.tensor([1]))
    assert float(records.top1_so_far()) == pytest.approx(100 * 4 / 6)
