"""Trainings on sequences side by side: their order, their labels, and their files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from scatterbrain.errors import UserError
from src.evaluation.sequence_comparison import (
    SequenceComparison,
    compare_trainings,
    comparison_figure,
    comparison_markdown,
    comparison_tables,
    read_results,
    save_results,
)
from src.evaluation.sequence_summary import SequenceSummary, metric_text, read_summary, write_summary


def summary(attention="full", value=0.5, task="copy", metric="accuracy", **changes):
    """A training; None for one that diverged."""
    history = [{"step": 1, "seconds": 2.0, metric: 0.1}, {"step": 3, "seconds": 4.0, metric: value or 0.1}]
    test = None if value is None else {"loss": 1.0, metric: value, "standard_error": 0.01}
    content = {
        **{"task": task, "attention": attention, "options": {}, "sizes": {}, "memory": 0.25, "metric": metric},
        **{"higher_is_better": metric == "accuracy", "seed": 0, "data": {"baselines": {"chance": 0.2}}, "length": 8},
        **{"batch_size": 2, "parameters": 3, "precision": "32-true", "device": "cpu", "learning_rate": 1e-3},
        **{"steps": 3, "steps_done": 3, "complete": value is not None, "error": None if value else "diverged"},
        **{"validation": history[-1], "best": history[-1], "test": test, "tokens_per_second": 1000.0, "seconds": 6.0},
        **{"total_seconds": 90.0, "peak_memory_mib": None, "checkpoints": {"last": "/here"}, "versions": {}},
        **{"command": "run.py", "history": history},
    }
    return SequenceSummary(**content | changes)


def labels(*summaries):
    """Labels of the first task, in their order."""
    return list(next(iter(SequenceComparison(list(summaries)).tasks().values())))


def test_the_best_comes_first_and_the_diverged_last():
    values = {"full": 2.0, "local": None, "sblocal": 1.5}
    by_perplexity = labels(*(summary(name, value, metric="perplexity") for name, value in values.items()))
    assert by_perplexity == ["sblocal", "full", "local"]
    trainings = [summary("full", 0.3), summary("local", 0.4), summary("smyrf", None), summary("full", 0.8, seed=1)]
    assert labels(*trainings) == ["full", "local", "smyrf"]  # 0.55 is the mean over seeds


def test_labels_name_what_sets_trainings_apart():
    assert labels(summary(), summary(learning_rate=1e-2, value=0.4)) == ["full, lr 0.001", "full, lr 0.01"]
    two = (summary("local", sizes={"local_context": size}, value=1 / size) for size in (4, 8))
    assert labels(*two) == ["local, local_context 4", "local, local_context 8"]
    assert labels(summary(seed=0), summary(seed=1)) == ["full"]
    assert labels(summary(), summary(seed=1, value=0.4, batch_size=8)) == ["full, batch 2", "full, batch 8"]
    assert labels(summary(), summary(seed=1, value=0.4, parameters=9)) == ["full, 3 weights", "full, 9 weights"]
    two = [summary(seed=seed, value=0.5 - seed / 10, options={"row_norm": "chi"} if seed else {}) for seed in (0, 1)]
    assert labels(*two) == ["full, row_norm None", "full, row_norm chi"]
    two = [
        summary(seed=seed, value=0.5 - seed / 10, data={"baselines": {}, "sha256": f"{seed}" * 64}) for seed in (0, 1)
    ]
    assert labels(*two) == ["full, data 000000", "full, data 111111"]
    several = SequenceComparison([summary(), summary(length=4096), summary(task="other")])
    assert list(several.tasks()) == ["copy, N 8", "copy, N 4,096", "other"]


def test_a_training_that_was_not_tested_is_beside_the_others():
    """One that was killed has its steps and minutes, and hides no result of another seed."""
    stopped = summary(seed=1, test=None, complete=False, steps_done=2, total_seconds=30.0)
    comparison = SequenceComparison([summary(value=0.7), stopped], ["runs/3"])
    assert labels(*comparison.summaries) == ["full", "full, not tested"]
    lines = comparison_markdown(comparison).splitlines()
    assert "| full | 1 | 25.0 % | 3 | 70.00 % | 1.00 % | 70.00 % | 70.00 % | 1,000 | 1.5 | - |" in lines
    assert "| full, not tested | 1 | 25.0 % | 2 of 3 | - | - | 50.00 % | 50.00 % | 1,000 | 0.5 | - |" in lines
    assert labels(stopped) == ["full"]


def test_one_seed_twice_is_no_second_seed():
    """An option that no summary has, such as the weight decay, must not become a mean over seeds."""
    trainings = [summary(), summary(seed=1), summary(value=0.1), summary(value=0.1, seed=1)]
    assert labels(*trainings) == ["full", "full (2)"]
    assert _mean_of(trainings, "full (2)") == 0.1


def _mean_of(trainings, label):
    (groups,) = SequenceComparison(trainings).tasks().values()
    return sum(each.test["accuracy"] for each in groups[label]) / len(groups[label])


def test_a_training_in_two_of_the_folders_counts_once(tmp_path):
    (tmp_path / "multirun" / "0").mkdir(parents=True)
    write_summary(tmp_path / "multirun" / "0", summary())
    assert len(compare_trainings([tmp_path, tmp_path / "multirun", tmp_path / "multirun" / "0"]).summaries) == 1


def test_the_table():
    comparison = SequenceComparison(
        [summary(value=0.5), summary(value=0.7, seed=1), summary("local", None, steps_done=2)], ["runs/3"]
    )
    lines = comparison_markdown(comparison).splitlines()
    assert "| full | 2 | 25.0 % | 3 | 60.00 % | 14.14 % | 60.00 % | 60.00 % | 1,000 | 1.5 | - |" in lines
    assert "| local | 1 | 25.0 % | 2 of 3 | diverged | - | 10.00 % | 10.00 % | 1,000 | 1.5 | - |" in lines
    assert "| (chance) |  |  |  | 20.00 % |  |  |  |  |  |  |" in lines
    assert lines[-1] == "Runs without results: runs/3."
    (table,) = comparison_tables(comparison)
    assert table.row_count == 3
    assert len(comparison_figure(comparison).axes) == 2
    assert metric_text("perplexity", 2.34567) == "2.346"
    assert metric_text("accuracy", None) == "-"


def test_files_are_read_back(tmp_path):
    comparison = SequenceComparison([summary(), summary("local", None)], ["runs/3"])
    save_results(tmp_path / "results.json", comparison)
    again = read_results(tmp_path / "results.json")
    assert again.failed == comparison.failed
    for ours, theirs in zip(again.summaries, comparison.summaries, strict=True):
        # paths and commands are of a machine
        assert ours == dataclasses.replace(theirs, checkpoints={}, command="")
    assert len((tmp_path / "results.json").read_text().splitlines()) == 7

    for name, each in zip("ab", comparison.summaries, strict=True):
        (tmp_path / name).mkdir()
        write_summary(tmp_path / name, each)
        assert read_summary(tmp_path / name / "sequence_training.json") == each
    assert compare_trainings([tmp_path]).summaries == comparison.summaries
    assert compare_trainings([tmp_path / "b", tmp_path / "a"]).summaries == comparison.summaries[::-1]


def test_what_is_no_training_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"There is no sequence_training\.json under"):
        compare_trainings([tmp_path])
    with pytest.raises(UserError, match=r"cannot be read"):
        read_summary(tmp_path / "sequence_training.json")
    path = Path(tmp_path, "sequence_training.json")
    path.write_text("{}")
    with pytest.raises(UserError, match=r"is no sequence_training\.json of this version"):
        read_summary(path)
    path.write_text(json.dumps({"results": [{"task": "copy"}], "failed": []}))
    with pytest.raises(UserError, match=r"holds no trainings on sequences of this version"):
        read_results(path)
