"""The progress bar: how often it reads the progress of the task."""

from __future__ import annotations

import types

import pytest

from src.tasks import progress
from src.tasks.classification_evaluation import ClassificationEvaluation
from src.tasks.progress import ImageProgressBar


@pytest.mark.parametrize(("refresh_rate", "read"), [(1, [0, 4, 8, 9]), (2, [0, 2, 4, 6, 8, 9]), (100, list(range(10)))])
def test_the_task_is_read_no_more_often_than_the_bar_is_drawn(refresh_rate, read, monkeypatch):
    bar = ImageProgressBar(refresh_rate=refresh_rate)
    seen = []
    for batch in range(10):
        monkeypatch.setattr(progress.time, "monotonic", lambda batch=batch: 100.0 + batch / 4)
        task = types.SimpleNamespace(progress_so_far=lambda batch=batch: seen.append(batch) or f"batch {batch}")
        bar._read(task, is_last=batch == 9)
    assert seen == read
    assert bar._column.text == "batch 9"


def test_processes_that_show_nothing_ask_for_nothing():
    bar = ImageProgressBar()
    bar.disable()
    task = types.SimpleNamespace()
    bar.on_test_batch_end(types.SimpleNamespace(), task, None, None, 0)
    bar.on_train_batch_end(types.SimpleNamespace(is_last_batch=True), task, None, None, 0)
    assert bar._column.text == ""


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_rate_is_that_of_all_processes_without_the_first_batch(world_size, monkeypatch):
    monkeypatch.setattr("time.perf_counter", lambda: 30.0)
    task = types.SimpleNamespace(
        classifiers=[types.SimpleNamespace(seeds=[0, 1])],
        trainer=types.SimpleNamespace(world_size=world_size),
        _tables=lambda: [types.SimpleNamespace(top1_so_far=lambda: 50.0)],
        _images_seen=48,
        _images_of_first_batch=8,
        _first_batch_ended=26.0,
    )
    task._timed_images = lambda: ClassificationEvaluation._timed_images(task)
    expected = f"{world_size * 2 * 10:.1f} images/s, top-1 50.00 %"
    assert ClassificationEvaluation.progress_so_far(task) == expected
