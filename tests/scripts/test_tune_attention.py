"""The search for tile settings: its choices and its report, with stand-ins for the GPU and the compiler."""

import ast
import dataclasses
import math

import pytest
import torch

from scatterbrain.errors import UserError
from scatterbrain.ops.common.backends import is_interpreted
from scatterbrain.ops.scatterbrain.triton.tiles import Tiles
from scripts import tune_attention as script
from src.analysis.benchmark import tiles as tune
from src.analysis.tools import PASSES, print_report

SHAPE = tune.Shape(2, 96, 5, 3)
START = Tiles(sum_rows=32, query_tiles=2)
CPU = torch.device("cpu")


class StandIn:
    """A workload with one optimum; every candidate compiles and is right."""

    def __init__(self, passes=PASSES):
        self.passes = passes
        self.timed = []

    def milliseconds(self, tiles):
        self.timed.append(tiles)
        time = 2 + abs(math.log2(tiles.sum_rows) - 8) + abs(math.log2(tiles.query_warps) - 3)
        return time + (abs(tiles.dk_stages - 3) if "training" in self.passes else 0)

    def error(self, tiles):
        return None


def searched(workload):
    search = tune.Search(START)
    search.run(workload)
    return search


def test_every_setting_is_searched():
    names = sorted(item.name for item in dataclasses.fields(Tiles) if not item.name.startswith("causal_"))
    assert sorted(tune.VALUES) == names


def test_search_finds_the_optimum():
    workload = StandIn()
    search = searched(workload)
    assert search.best == dataclasses.replace(START, sum_rows=256, query_warps=8, dk_stages=3)
    assert (search.present_milliseconds, search.milliseconds) == (9, 2)
    assert workload.timed[0] == START
    assert len(set(workload.timed)) == len(workload.timed) == search.tried  # each once


def test_the_forward_pass_leaves_the_gradients_alone():
    workload = StandIn(("forward",))
    assert searched(workload).best.query_warps == 8
    gradients = [name for name in tune.VALUES if name.startswith(("dq_", "dk_"))]
    assert all(getattr(x, name) == getattr(START, name) for x in workload.timed for name in gradients)


def test_what_fails_or_is_wrong_is_left_out():
    workload = StandIn()
    time = workload.milliseconds

    def milliseconds(tiles):
        if tiles.query_warps == 2:
            raise ValueError("out of resource\nmore")
        return None if tiles.query_warps == 4 else time(tiles)

    workload.milliseconds = milliseconds
    workload.error = lambda tiles: "wrong: output" if tiles.sum_rows >= 128 else None
    search = searched(workload)
    assert (search.best.sum_rows, search.best.query_warps) == (64, 8)
    assert search.left_out.keys() == {"ValueError: out of resource", "a CUDA graph cannot capture it", "wrong: output"}


def test_present_settings_that_do_not_run_are_replaced(capsys):
    workload = StandIn()
    workload.error = lambda tiles: "no" if tiles == START else None
    search = searched(workload)
    assert search.best.sum_rows == 256
    assert search.present_milliseconds == math.inf
    print_report([tune.result_table({SHAPE: search})])
    assert f"{search.tried} │          - │       2 │     - │" in capsys.readouterr().out


def test_gains_within_the_noise_change_nothing():
    workload = StandIn()
    workload.milliseconds = lambda tiles: 1 if tiles == START else 1 - tune.MIN_GAIN / 2
    assert searched(workload).best == START


@pytest.mark.skipif(not is_interpreted(), reason="the kernels are compiled for the GPU here")
def test_results_are_compared_with_the_specification():
    workload = tune.Workload(tune.Shape(2, 40, 5, 3), torch.float32, CPU, PASSES)
    tiles = Tiles(sum_rows=16, query_rows=32, key_rows=16, dq_rows=16, dq_keys=16, dk_rows=16, dk_queries=16)
    assert workload.error(tiles) is None
    for name, expected in zip(tune.TENSORS[1:], workload.expected[1:], strict=True):
        before = expected[1, 0, 39].clone()
        expected[1, 0, 39] *= 1.1
        assert f"wrong: training, {name}" in workload.error(tiles)
        workload.passes = ("forward",)
        assert workload.error(tiles) is None
        workload.passes = PASSES
        expected[1, 0, 39] = before
    workload.expected[0][1, 0, 39] *= 1.1
    assert "wrong: forward, output" in workload.error(tiles)


def test_values_that_are_not_finite_are_wrong(monkeypatch):
    workload = tune.Workload(SHAPE, torch.float32, CPU, ("forward",))
    monkeypatch.setattr(tune, "attention", lambda query, *_, **options: query * math.nan)
    assert workload.error(START).startswith("wrong: forward, output: nan")


@pytest.mark.parametrize("length", [1, 784, 1024, 3136, 12544, 65536, 5000])
def test_checked_slice_has_the_remainders_of_the_whole(length):
    checked = tune.Shape(1, length, 1, 1).checked_length
    assert checked <= min(length, 1024)
    assert all(checked % tile == length % tile for tile in (16, 32, 64, 128, 256, 512))


# Output ---------------------------------------------------------------------------------------------------------------


def test_rows_can_be_pasted():
    far = Tiles(**{name: 16 for name in tune.VALUES})
    found = {
        tune.Shape(16, 12544, 49, 12): far,
        tune.Shape(128, 784, 12, 3): Tiles(sum_rows=32),
    }
    lines = tune.table_rows(found, 2, 9)
    assert max(map(len, lines)) <= 120
    rows = eval("[\n" + "\n".join(lines) + "\n]", {"Tiles": Tiles})  # what the file would hold
    assert rows == [(784, 12, 16, 2, 9, Tiles(sum_rows=32)), (12544, 49, 32, 2, 9, far)]
    ast.parse("[\n" + "\n".join(lines) + "\n]")


@pytest.mark.parametrize(("rows", "padded"), [(1, 16), (3, 16), (8, 16), (9, 32), (12, 32), (24, 64)])
def test_features_are_padded_as_in_the_kernels(rows, padded):
    from scatterbrain.ops.common.passes import padded_width

    assert tune.Shape(1, 1, 1, rows).padded_features == padded_width(2 * rows) == padded


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
        tune.check_shapes([tune.Shape(1, 64, 3, 500)], torch.bfloat16, CPU)


@pytest.fixture
def stand_ins(monkeypatch):
    """A CUDA device that is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tune, "check_shapes", lambda *_: None)
    monkeypatch.setattr(tune, "machine_line", lambda device: "gpu stand-in")
    monkeypatch.setattr(tune, "tiles_for", lambda *_: START)
    monkeypatch.setattr(tune, "Workload", lambda *_: StandIn())


def test_whole_run(stand_ins, capsys):
    assert script.main(["--shapes", str(SHAPE)]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("gpu stand-in\n")
    (row,) = (line for line in printed.splitlines() if line.startswith("    (96, 5, 16, 2, 9, Tiles("))
    assert "sum_rows=256" in row
    assert str(SHAPE) in printed.splitlines()[4]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("CUDA error: an illegal memory access\nmore"),
            "stopped at {}: CUDA error",
        ),
        (KeyboardInterrupt, "interrupted"),
    ],
)
def test_what_was_measured_outlives_a_fault_and_an_interrupt(error, words, stand_ins, monkeypatch, capsys):
    workload = StandIn()
    time = workload.milliseconds

    def milliseconds(tiles):
        if tiles.query_warps != START.query_warps:
            raise error
        return time(tiles)

    def lost():
        raise RuntimeError(str(error))

    workload.milliseconds = milliseconds
    monkeypatch.setattr(tune, "Workload", lambda *_: workload)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert script.main(["--shapes", str(SHAPE), str(tune.SHAPES[0])]) == 1
    captured = capsys.readouterr()
    assert words.format(SHAPE) in captured.err.splitlines()[-1]
    assert "sum_rows=256" in captured.out
    assert str(tune.SHAPES[0]) not in captured.out
    assert f"({tune.SHAPES[0].length}, " not in captured.out
