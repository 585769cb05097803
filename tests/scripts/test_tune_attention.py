"""The search for tile settings: its order, its choices and its report, with stand-ins for the GPU and the compiler."""

import ast
import dataclasses
import math
import multiprocessing
import os
import time

import pytest
import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.common.backends import is_interpreted
from scatterbrain.ops.scatterbrain.triton.tiles import Tiles
from scripts import tune_attention as script
from src.analysis.benchmark import precision, tile_search
from src.analysis.benchmark import tiles as tune
from src.analysis.benchmark.report import PASSES, print_report

SHAPE = tune.Shape(2, 96, 5, 3)
START = Tiles(sum_rows=32, query_tiles=2)


def cost(tiles, attention_pass):
    """A time with one optimum, far from `START` in the rows of the sums."""
    time = 2 + abs(math.log2(tiles.sum_rows) - 8) + abs(math.log2(tiles.query_warps) - 3)
    return time + (abs(tiles.dk_stages - 3) if attention_pass == "training" else 0)


def accept(candidates, passes):
    """Every candidate compiles and is right."""
    return dict.fromkeys(candidates)


def make_search(check=accept, measure=cost, passes=PASSES):
    return tile_search.Search(START, passes, check, measure)


def searched(search):
    for group in tile_search.GROUPS:
        if tile_search.passes_of(group, search.passes):
            search.run_group(group)
    return search


def test_groups_hold_every_setting_once():
    names = [name for group in tile_search.GROUPS.values() for name in group]
    searched_for = sorted(item.name for item in dataclasses.fields(Tiles) if not item.name.startswith("causal_"))
    assert sorted(names) == searched_for == sorted(tile_search.LIMITS)


@pytest.mark.parametrize("group", tile_search.GROUPS)
def test_grid_is_near_and_in_order(group):
    candidates = tile_search.candidates_around(START, tile_search.GROUPS[group])
    assert candidates[0] == START
    assert len(set(candidates)) == len(candidates)
    changes = [[name for name, value in vars(x).items() if value != getattr(START, name)] for x in candidates]
    assert all(set(names) <= set(tile_search.GROUPS[group]) for names in changes)
    assert [len(names) for names in changes] == sorted(map(len, changes))
    assert len(changes[-1]) == tile_search.MAX_CHANGES
    for name, (low, high) in tile_search.GROUPS[group].items():
        values = {getattr(x, name) for x in candidates} - {None}
        assert len(values) >= 2
        assert all(low <= value <= high for value in values)


@pytest.mark.parametrize(
    ("name", "present", "values"),
    [
        ("sum_rows", 64, (64, 32, 128)),
        ("sum_rows", 16, (16, 32)),
        ("query_stages", 3, (3, 2, 4)),
        ("query_stages", 2, (2, 3)),
        ("query_tiles", 1, (1, 2)),
        ("dq_registers", 168, (168, None, 128, 232)),
        ("dk_registers", None, (None, 128, 168, 232)),
        ("sum_programs", 6, (6,)),  # the present value may lie outside the limits
    ],
)
def test_values(name, present, values):
    assert tile_search.values_around(name, present) == values


def test_search_walks_to_the_optimum_group_by_group():
    order = []
    search = searched(make_search(lambda batch, passes: order.extend(batch) or accept(batch, passes)))
    assert search.best == dataclasses.replace(START, sum_rows=256, query_warps=8, dk_stages=3)
    assert list(search.trials) == ["sums", "queries", "query gradient", "key gradients"]
    assert search.present["queries"].sum_rows == 256  # the best of a group is where the next starts
    for trials in search.trials.values():  # each is compiled once, the present settings once in each group
        assert all(order.count(tiles) == 1 for tiles in trials if tiles not in search.present.values())


def test_passes_choose_groups_and_timings():
    timed = set()
    search = make_search(measure=lambda tiles, name: timed.add(name) or cost(tiles, name), passes=("forward",))
    searched(search)
    assert list(search.trials) == ["sums", "queries"]
    assert timed == {"forward"}
    search = make_search()
    searched(search)
    assert {tuple(trial.milliseconds) for trial in search.trials["sums"].values()} == {PASSES}
    assert {tuple(trial.milliseconds) for trial in search.trials["key gradients"].values()} == {("training",)}


def test_what_failed_elsewhere_is_never_run_here():
    run = []

    def check(candidates, passes):
        return {x: "out of resource" if x.sum_rows >= 128 else None for x in candidates}

    search = make_search(check, lambda tiles, name: run.append(tiles) or cost(tiles, name))
    searched(search)
    assert run
    assert max(tiles.sum_rows for tiles in run) == search.best.sum_rows == 64
    (line,) = tune.left_out(search.trials["sums"])
    assert line.endswith(": out of resource")


def test_present_settings_that_do_not_run_are_replaced():
    search = make_search(lambda batch, *_: {x: "no" if x == START else None for x in batch})
    search.run_group("sums")
    assert search.best.sum_rows == 256
    present = search.trials["sums"][START]
    assert present.score == math.inf
    assert {tile_search.ratio_to_present(trial, present) for trial in search.trials["sums"].values()} == {None}


def test_gains_within_the_noise_change_nothing():
    search = make_search(measure=lambda tiles, name: 1 if tiles == START else 1 - tile_search.MIN_GAIN / 2)
    searched(search)
    assert search.best == START


def test_finalists_run_in_turn_and_the_median_counts():
    first = set()

    def measure(tiles, name):
        if tiles not in first:
            first.add(tiles)
            return 0.1 if tiles.sum_warps == 8 else 1.0  # lucky once
        return 1.2 if tiles.sum_warps == 8 else 1.0

    search = make_search(measure=measure, passes=("forward",))
    search.run_group("sums")
    assert search.best == START
    samples = sorted(len(trial.milliseconds["forward"]) for trial in search.trials["sums"].values())
    assert samples[-tile_search.FINALISTS - 1 :] == [1 + tile_search.FINAL_ROUNDS] * (tile_search.FINALISTS + 1)
    assert set(samples[: -tile_search.FINALISTS - 1]) == {1}


def test_what_cannot_be_captured_is_left_out():
    search = make_search(measure=lambda tiles, name: None if tiles.sum_rows > 64 else cost(tiles, name))
    search.run_group("sums")
    assert search.best.sum_rows == 64
    assert any("CUDA graph" in line for line in tune.left_out(search.trials["sums"]))


# Processes ------------------------------------------------------------------------------------------------------------


def check_stand_in(tiles, passes):
    """Fails by the rows of the sums, in all the ways in which a candidate can."""
    if tiles.sum_rows == 32:
        raise ValueError("out of resource\nmore")
    if tiles.sum_rows == 64:
        os._exit(7)
    if tiles.sum_rows == 128:
        time.sleep(60)
    return None if passes == ("forward", "training") else "other passes"


def test_processes_that_fail_are_reported_and_replaced():
    candidates = [Tiles(sum_rows=rows, sum_warps=warps) for rows in (16, 32, 64, 128, 256) for warps in (2, 4)]
    found = tune.check_all(check_stand_in, 3, candidates, PASSES, seconds=0.5, method="fork")
    ended = "its process ended, or it took more than 0.5 s"
    reasons = {16: None, 32: "ValueError: out of resource", 64: ended, 128: ended, 256: None}
    assert found == {tiles: reasons[tiles.sum_rows] for tiles in candidates}
    assert not multiprocessing.active_children()


def test_process_whose_device_is_lost_is_replaced(monkeypatch):
    monkeypatch.setattr(tune, "device_works", lambda: False)
    candidates = [Tiles(sum_rows=32), Tiles(sum_rows=16)]
    reasons = tune.check_all(check_stand_in, 1, candidates, PASSES, method="fork")
    assert list(reasons.values()) == ["ValueError: out of resource", None]


def test_processes_that_cannot_start_end_the_check():
    (reason,) = tune.check_all(check_stand_in, 1, [Tiles(sum_rows=16)], PASSES, seconds="none", method="fork").values()
    assert reason == "no process could check it"


@pytest.mark.skipif(not is_interpreted(), reason="the kernels are compiled for the GPU here")
def test_check_compares_with_the_specification():
    shape = tune.Shape(2, 40, 5, 3)
    workload = tune.Workload(shape, torch.float32, "cpu", shape.specification(torch.float32, "cpu"))
    tiles = Tiles(sum_rows=16, query_rows=32, key_rows=16, dq_rows=16, dq_keys=16, dk_rows=16, dk_queries=16)
    assert workload.check(tiles, PASSES) is None
    for name, expected in zip(precision.TENSORS[1:], workload.expected[1:], strict=True):
        before = expected[1, 0, 39].clone()
        expected[1, 0, 39] *= 1.1
        assert workload.check(tiles, ("forward",)) is None
        assert f"wrong: training, {name}" in workload.check(tiles, ("training",))
        expected[1, 0, 39] = before
    workload.expected[0][1, 0, 39] *= 1.1
    assert "wrong: forward, output" in workload.check(tiles, PASSES)


def test_values_that_are_not_finite_are_wrong(monkeypatch):
    monkeypatch.setattr(tune, "attention", lambda query, *_, **options: query * math.nan)
    reason = tune.Workload(SHAPE, torch.float32, "cpu", []).check(START, ("forward",))
    assert reason == "wrong: forward gives values that are not finite"


@pytest.mark.parametrize("length", [1, 784, 1024, 3136, 12544, 65536, 5000])
def test_checked_slice_has_the_remainders_of_the_whole(length):
    checked = tune.Shape(1, length, 1, 1).checked_length
    assert checked <= min(length, tune.MOST_CHECKED)
    assert all(checked % tile == length % tile for tile in (16, 32, 64, 128, 256, 512))


# Output ---------------------------------------------------------------------------------------------------------------


def test_rows_can_be_pasted():
    far = Tiles(**{name: 16 for name in tile_search.LIMITS})
    found = {
        tune.Shape(16, 12544, 49, 12): far,
        tune.Shape(128, 784, 12, 3): Tiles(sum_rows=32),
        tune.Shape(1, 784, 12, 3): Tiles(sum_rows=16),
    }
    lines = tune.table_rows(found, 2, 9)
    assert max(map(len, lines)) <= 120
    rows = eval("[\n" + "\n".join(lines) + "\n]", {"Tiles": Tiles})  # what the file would hold
    assert rows == [(784, 12, 16, 2, 9, Tiles(sum_rows=32)), (12544, 49, 32, 2, 9, far)]
    assert "    # (784, 12, 16, 2, 9, Tiles(sum_rows=16))," in lines
    ast.parse("[\n" + "\n".join(lines) + "\n]")


@pytest.mark.parametrize(("rows", "padded"), [(1, 16), (3, 16), (8, 16), (9, 32), (12, 32), (24, 64)])
def test_features_are_padded_as_in_the_kernels(rows, padded):
    from scatterbrain.ops.scatterbrain.triton.operator import _padded

    assert tune.Shape(1, 1, 1, rows).padded_features == _padded(2 * rows) == padded


def test_tables_show_the_best_and_the_present(capsys):
    search = searched(make_search(lambda batch, *_: {x: "no" if x.sum_warps == 2 else None for x in batch}))
    print_report([tune.result_table(SHAPE, "sums", search)])
    text = capsys.readouterr().out
    timed = [trial for trial in search.trials["sums"].values() if trial.milliseconds]
    assert f"{SHAPE}: sums, {len(timed)} measured" in text
    assert text.count("present") == text.count("chosen") == 1
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert "256" in next(line for line in lines if "chosen" in line)
    assert "1.000" in next(line for line in lines if "present" in line)
    assert len(lines) == tune.ROWS_SHOWN + 1
    assert f"left out {len(search.trials['sums']) - len(timed)}: no" in text


# Command line ---------------------------------------------------------------------------------------------------------


def test_a_cuda_device_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 1
    assert "CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,4,5", "1,2,3,x", "0,2,3,4"])
def test_shapes_are_four_numbers(text, capsys):
    assert script.main(["--shapes", text]) == 1
    assert "--shapes" in capsys.readouterr().err


def test_shapes_that_the_kernels_do_not_take_are_refused():
    with pytest.raises(UserError, match=r"--shapes 1,64,3,500: .* cannot run this"):
        tune.check_shapes([tune.Shape(1, 64, 3, 500)], torch.bfloat16, torch.device("cpu"))


@pytest.fixture
def stand_ins(monkeypatch):
    """A CUDA device that is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tune, "check_shapes", lambda *_: None)
    monkeypatch.setattr(tune, "machine_line", lambda device: "gpu stand-in")
    monkeypatch.setattr(tune, "make_search", lambda *_: make_search())


def test_whole_run(stand_ins, capsys):
    assert script.main(["--shapes", str(SHAPE)]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("gpu stand-in\n")
    (row,) = (line for line in printed.splitlines() if line.startswith("    (96, 5, 16, 2, 9, Tiles("))
    assert "sum_rows=256" in row
    for group in tile_search.GROUPS:
        assert f"{SHAPE}: {group}, " in printed


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("CUDA error: an illegal memory access\nmore"),
            "broken off at {}, queries: CUDA error",
        ),
        (KeyboardInterrupt, "interrupted"),
    ],
)
def test_what_was_measured_outlives_a_fault_and_an_interrupt(error, words, stand_ins, monkeypatch, capsys):
    def measure(tiles, name):
        if tiles.query_warps != START.query_warps:
            raise error
        return cost(tiles, name)

    monkeypatch.setattr(tune, "make_search", lambda *_: make_search(measure=measure))
    assert script.main(["--shapes", str(SHAPE), str(tune.SHAPES[0])]) == 1
    captured = capsys.readouterr()
    assert words.format(SHAPE) in captured.err.splitlines()[-1]
    assert "sum_rows=256" in captured.out
    assert f"{SHAPE}: sums, " in captured.out
    assert f"({tune.SHAPES[0].length}, " not in captured.out
