"""Counts of fallback tiles: by the criterion of the kernels, and from the command line."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from scatterbrain.ops.common import passes
from scatterbrain.ops.scatterbrain.triton import operator as fused_operator
from scripts import benchmark_attention as benchmark
from src.analysis.benchmark import attention
from tests.scatterbrain.ops import fallback_tiles
from tests.scatterbrain.ops.test_fused_attention import adversarial, needs_interpreter


@needs_interpreter
def test_the_kernels_recompute_the_same_tiles(monkeypatch):
    monkeypatch.setattr(passes, "PASSES", passes.Cache())  # passes of earlier calls have another limit
    monkeypatch.setattr(fused_operator, "CANCELLATION_LIMIT_FLOAT32", 4.0)
    (query, key, value, rows), window = adversarial("cpu", torch.float32)
    arguments = (query, key, value, rows, None, window, 0.25, True, False)
    statistics = fused_operator.fused_attention(*arguments, 0.0, True)[1]
    fallback = fused_operator.read_statistics(statistics, *arguments)["fallback_flags"]
    ours = fallback_tiles.fallback_queries(query[:, 0].double(), key[:, 0].double(), rows.double(), window, 4.0)
    tile = -(-query.shape[2] // fallback.shape[1])
    tile = 1 << (tile - 1).bit_length()
    tiles = [bool(part.any()) for part in ours[0].split(tile)]
    assert tiles == fallback[0].bool().tolist()
    assert True in tiles
    assert False in tiles


@needs_interpreter
def test_the_benchmark_counts_what_the_kernels_recompute():
    options = ["--device", "cpu", "--dim", "16", "--batch", "2", "--lengths", "64"]
    bench = attention.AttentionBench(benchmark.build_parser().parse_args(options))
    module = bench.attention("sblocal", 64, 64).module
    module.backend = "triton"
    assert attention.fallback_tiles(module, bench.inputs(64)) == 0
    sharp = [20 * x for x in bench.inputs(64)]
    assert attention.fallback_tiles(module, sharp) > 0


def test_the_command(tmp_path, capsys, monkeypatch):
    arguments = ["--shapes", "3,64,5,2", "2,40,3,1", "--num-seeds", "2", "--output", str(tmp_path / "tiles.json")]
    monkeypatch.setattr(fallback_tiles, "CANCELLATION_LIMIT", 0.9)  # many are past it
    assert fallback_tiles.main([*arguments, "--tile", "16"]) == 0
    content = json.loads((tmp_path / "tiles.json").read_text())
    assert [each["shape"] for each in content["results"]] == ["3,64,5,2"] * 2 + ["2,40,3,1"] * 2
    assert all(0 < each["tiles"] <= each["queries"] for each in content["results"])
    assert content["results"][0]["queries"] != content["results"][1]["queries"]
    assert "of 384" in capsys.readouterr().out
    monkeypatch.setattr(fallback_tiles, "CANCELLATION_LIMIT", 1e9)  # none is
    assert fallback_tiles.main([*arguments, "--std", "0.5"]) == 0
    assert "0 of 384" in capsys.readouterr().out
    assert fallback_tiles.main(["--shapes", "3,64"]) == 1
    assert "'3,64' is not B,N,W,R" in capsys.readouterr().err
