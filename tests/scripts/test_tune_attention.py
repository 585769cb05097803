"""The search for tile settings: its order, its choices and its report, with stand-ins for the GPU and the compiler."""

import ast
import contextlib
import dataclasses
import json
import math
import os
import time

import pytest
import torch
from rich.console import Console

from scatterbrain.ops.common.backends import is_interpreted
from scatterbrain.ops.scatterbrain.triton.tiles import Tiles
from scripts import tune_attention as tune

SUMS, *_ = tune.GROUPS
SHAPE = tune.Shape(2, 96, 5, 3)
START = Tiles(sum_rows=32, query_tiles=2)


def cost(tiles, attention_pass):
    """A time with one optimum, far from `START` in the rows of the sums."""
    time = 2 + abs(math.log2(tiles.sum_rows) - 8) + abs(math.log2(tiles.query_warps) - 3)
    return time + (abs(tiles.dk_stages - 3) if attention_pass == "training" else 0)


def accept(candidates, passes, deadline):
    """Every candidate compiles and is right."""
    return {tiles: tune.Verdict() for tiles in candidates}


def make_search(prepare=accept, measure=cost, passes=tune.PASSES, **options):
    return tune.Search(START, passes, prepare, measure, 16, **options)


def searched(search, budget=None, shapes=(SHAPE,), **options):
    return tune.run_searches(shapes, search.passes, budget, lambda shape: contextlib.nullcontext(search), **options)


def test_groups_hold_every_setting_once():
    names = [name for group in tune.GROUPS for name in group.fields]
    searched_for = sorted(item.name for item in dataclasses.fields(Tiles) if not item.name.startswith("causal_"))
    assert sorted(names) == searched_for == sorted(tune.LIMITS)


@pytest.mark.parametrize("group", tune.GROUPS, ids=lambda group: group.name)
def test_grid_is_near_and_in_order(group):
    candidates = tune.candidates_around(START, group)
    assert candidates[0] == START
    assert len(set(candidates)) == len(candidates)
    changes = [[name for name, value in vars(x).items() if value != getattr(START, name)] for x in candidates]
    assert all(set(names) <= set(group.fields) for names in changes)
    assert [len(names) for names in changes] == sorted(map(len, changes))
    assert len(changes[-1]) == tune.MAX_CHANGES
    for name in group.fields:
        low, high = tune.LIMITS[name]
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
    assert tune.values_around(name, present) == values


def test_search_walks_to_the_optimum_group_by_group():
    order = []
    search = make_search(lambda batch, passes, deadline: order.extend(batch) or accept(batch, passes, deadline))
    searches, broken_off = searched(search)
    assert broken_off is None
    assert searches == {SHAPE: search}
    assert search.best == dataclasses.replace(START, sum_rows=256, query_warps=8, dk_stages=3)
    assert list(search.trials) == ["sums", "queries", "query gradient", "key gradients"]
    assert search.present["queries"].sum_rows == 256  # the best of a group goes on to the next
    for trials in search.trials.values():  # each is compiled once, the present settings once in each group
        assert all(order.count(tiles) == 1 for tiles in trials if tiles not in search.present.values())
    assert not search.unfinished


def test_passes_choose_groups_and_timings():
    timed = set()
    search = make_search(measure=lambda tiles, name: timed.add(name) or cost(tiles, name), passes=("forward",))
    searched(search)
    assert list(search.trials) == ["sums", "queries"]
    assert timed == {"forward"}
    search = make_search()
    searched(search)
    assert {tuple(trial.milliseconds) for trial in search.trials["sums"].values()} == {tune.PASSES}
    assert {tuple(trial.milliseconds) for trial in search.trials["key gradients"].values()} == {("training",)}


def test_what_failed_elsewhere_is_never_run_here():
    run = []

    def prepare(candidates, passes, deadline):
        return {x: tune.Verdict("out of resource" if x.sum_rows >= 128 else None) for x in candidates}

    search = make_search(prepare, lambda tiles, name: run.append(tiles) or cost(tiles, name))
    searched(search)
    assert run
    assert max(tiles.sum_rows for tiles in run) == search.best.sum_rows == 64
    (line,) = tune.left_out(search.trials["sums"])
    assert line.endswith(": out of resource")


def test_present_settings_that_do_not_run_are_replaced():
    search = make_search(lambda batch, *_: {x: tune.Verdict("no" if x == START else None) for x in batch})
    search.run_group(SUMS, math.inf)
    assert search.best.sum_rows == 256
    present = search.trials["sums"][START]
    assert present.score == math.inf
    assert {tune.ratio_to_present(trial, present) for trial in search.trials["sums"].values()} == {None}


def test_gains_within_the_noise_change_nothing():
    search = make_search(measure=lambda tiles, name: 1 if tiles == START else 1 - tune.MIN_GAIN / 2)
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
    search.run_group(SUMS, math.inf)
    assert search.best == START
    samples = sorted(len(trial.milliseconds["forward"]) for trial in search.trials["sums"].values())
    assert samples[-tune.FINALISTS - 1 :] == [1 + tune.FINAL_ROUNDS] * (tune.FINALISTS + 1)
    assert set(samples[: -tune.FINALISTS - 1]) == {1}


def test_what_cannot_be_captured_is_left_out():
    search = make_search(measure=lambda tiles, name: None if tiles.sum_rows > 64 else cost(tiles, name))
    search.run_group(SUMS, math.inf)
    assert search.best.sum_rows == 64
    assert any("CUDA graph" in line for line in tune.left_out(search.trials["sums"]))


def test_budget_is_shared_and_what_was_measured_is_kept():
    now = [0.0]

    def measure(tiles, name):
        now[0] += 0.1
        return cost(tiles, name)

    search = make_search(measure=measure, clock=lambda: now[0])
    searched(search, 80, clock=lambda: now[0])
    assert search.unfinished == ["sums", "queries"]  # what these leave is enough for the gradients
    assert now[0] < 100  # the finals of each group are not cut short
    assert all(search.present[name] in trials for name, trials in search.trials.items())
    assert search.best.sum_rows == 128  # on the way to 256
    assert [group["finished"] for group in tune.content({SHAPE: search})[0]["groups"]] == [False, False, True, True]


def test_fault_of_the_device_keeps_what_was_measured():
    def measure(tiles, name):
        if tiles.query_warps != START.query_warps:
            raise RuntimeError("CUDA error: an illegal memory access\nmore")
        return cost(tiles, name)

    searches, broken_off = searched(make_search(measure=measure), shapes=(SHAPE, tune.SHAPES[0]))
    assert broken_off == f"{SHAPE}: CUDA error: an illegal memory access"
    assert list(searches) == [SHAPE]
    assert searches[SHAPE].best.sum_rows == 256


# Processes ------------------------------------------------------------------------------------------------------------


def check_stand_in(tiles, passes):
    """Fails by the rows of the sums, in all the ways in which a candidate can."""
    if tiles.sum_rows == 32:
        raise ValueError("out of resource\nmore")
    if tiles.sum_rows == 64:
        os._exit(7)
    if tiles.sum_rows == 128:
        time.sleep(60)
    return tune.Verdict(None, {"out": float(len(passes))})


def test_processes_that_fail_are_told_and_replaced():
    candidates = [Tiles(sum_rows=rows, sum_warps=warps) for rows in (16, 32, 64, 128, 256) for warps in (2, 4)]
    with tune.Workers(check_stand_in, 3, seconds=0.5, method="fork") as workers:
        verdicts = workers.run(candidates, ("forward", "training"), math.inf)
        processes = [worker.process for worker in workers.idle]
        assert not workers.busy
        assert workers.run([Tiles()], ("forward",), time.monotonic() - 1) == {}
    assert not any(process.is_alive() for process in processes)
    reasons = {16: None, 32: "ValueError: out of resource", 64: "status 7", 128: "more than 0.5 s", 256: None}
    assert set(verdicts) == set(candidates)
    for tiles, verdict in verdicts.items():
        if reasons[tiles.sum_rows] is None:
            assert verdict == tune.Verdict(None, {"out": 2.0})
        else:
            assert reasons[tiles.sum_rows] in verdict.reason


def test_process_whose_device_is_lost_is_replaced(monkeypatch):
    monkeypatch.setattr(tune, "device_works", lambda: False)
    with tune.Workers(check_stand_in, 1, method="fork") as workers:
        verdicts = workers.run([Tiles(sum_rows=32), Tiles(sum_rows=16)], ("forward",), math.inf)
    assert [verdict.reason for verdict in verdicts.values()] == ["ValueError: out of resource", None]


@pytest.mark.skipif(not is_interpreted(), reason="the kernels are compiled for the GPU here")
def test_check_compares_with_the_specification():
    workload = tune.Workload(tune.Shape(2, 40, 5, 3), torch.float32, "cpu")
    check = tune.KernelCheck(workload, tune.specification(workload.shape, torch.float32, "cpu"))
    tiles = Tiles(sum_rows=16, query_rows=32, key_rows=16, dq_rows=16, dq_keys=16, dk_rows=16, dk_queries=16)
    verdict = check(tiles, tune.PASSES)
    assert verdict.reason is None
    assert set(verdict.errors) == {"forward: out", *(f"training: {name}" for name in tune.RESULTS)}
    check.expected["gradient of key"][1, 0, 39] *= 1.1
    assert check(tiles, ("forward",)).reason is None
    assert "wrong: training, gradient of key" in check(tiles, ("training",)).reason


def test_values_that_are_not_finite_are_wrong(monkeypatch):
    workload = tune.Workload(SHAPE, torch.float32, "cpu")
    monkeypatch.setattr(tune, "attention", lambda query, *_, **options: query * math.nan)
    reason = tune.KernelCheck(workload, {})(START, ("forward",)).reason
    assert reason == "wrong: forward gives values that are not finite"


@pytest.mark.parametrize("length", [1, 784, 1024, 3136, 12544, 65536, 5000])
def test_checked_slice_has_the_remainders_of_the_whole(length):
    checked = tune.Shape(1, length, 1, 1).checked_length
    assert checked <= min(length, tune.MOST_CHECKED)
    assert all(checked % tile == length % tile for tile in (16, 32, 64, 128, 256, 512))


# Output ---------------------------------------------------------------------------------------------------------------


def test_rows_can_be_pasted():
    far = Tiles(**{name: 16 for name in tune.LIMITS})
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


def test_report_shows_the_best_and_the_present(capsys):
    search = make_search()
    searched(search)
    tune.report(Console(width=200), {SHAPE: search}, ["    row"])
    text = capsys.readouterr().out
    first = text.split(f"{SHAPE}: queries")[0]
    assert f"{SHAPE}: sums, {len(search.trials['sums'])} measured" in first
    assert first.count("present") == first.count("chosen") == 1
    best = next(line for line in first.splitlines() if "chosen" in line)
    assert "256" in best
    assert text.rstrip().endswith("row")
    assert len([line for line in first.splitlines() if line.startswith("│")]) == tune.ROWS_SHOWN + 1


def test_content_is_json(tmp_path):
    search = make_search(lambda batch, *_: {x: tune.Verdict("no" if x.sum_warps == 8 else None) for x in batch})
    searched(search)
    (entry,) = json.loads(json.dumps(tune.content({SHAPE: search}), allow_nan=False))
    assert entry["shape"] == dataclasses.asdict(SHAPE)
    assert Tiles(**entry["present"]) == START
    assert Tiles(**entry["best"]) == search.best
    trials = entry["groups"][0]["trials"]
    present = next(row for row in trials if Tiles(**row["tiles"]) == START)
    assert present["ratio_to_present"] == 1
    assert {row["left_out"] for row in trials} == {None, "no"}
    assert all((row["left_out"] is None) == bool(row["milliseconds"]) for row in trials)


# Command line ---------------------------------------------------------------------------------------------------------


def test_a_cuda_device_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    assert "CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,4,5", "1,2,3,x", "0,2,3,4"])
def test_shapes_are_four_numbers(text, capsys):
    assert tune.main(["--shapes", text]) == 1
    assert "--shapes" in capsys.readouterr().err


def test_shapes_that_the_kernels_do_not_take_are_refused():
    arguments = tune.build_parser().parse_args(["--shapes", "1,64,3,500"])
    with pytest.raises(tune.UserError, match=r"--shapes 1,64,3,500: .* cannot run this"):
        tune.check_shapes(arguments, torch.device("cpu"))


def test_whole_run_with_stand_ins(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tune, "check_shapes", lambda arguments, device: None)
    monkeypatch.setattr(tune, "machine_info", lambda device: {"gpu": "stand-in"})
    monkeypatch.setattr(tune, "gpu_search", lambda shape, arguments: contextlib.nullcontext(make_search()))
    output = tmp_path / "tiles.json"
    assert tune.main(["--shapes", str(SHAPE), "--output", str(output)]) == 0
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written["machine"] == {"gpu": "stand-in"}
    assert written["settings"]["shapes"] == [str(SHAPE)]
    assert written["broken_off"] is None
    assert Tiles(**written["shapes"][0]["best"]).sum_rows == 256
    printed = capsys.readouterr().out
    assert all(line in printed for line in written["table"])
