"""The frontier of error and time: what is written and drawn, what is resumed, and mistakes in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from scatterbrain.attention import create_attention
from scripts.benchmark_frontier import build_parser, main
from src.analysis.benchmark import frontier

DIM, LENGTH, HEADS = 8, 80, 2
METHODS = "local,sbcluster,pisa"
POINT = {"method", "sizes", "batch", "length", "milliseconds", "ratio_to_full", "clock", "columns", "mebibytes"}
POINT |= {"gigaoperations", "error"}


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    generator = np.random.default_rng(0)
    content = {f"{kind}{layer}": generator.normal(size=(1, LENGTH, HEADS, DIM)) for kind in "qkv" for layer in (0, 3)}
    path = tmp_path_factory.mktemp("tensors") / "tiny_qkv.npz"
    np.savez(path, **{name: value.astype(np.float16) for name, value in content.items()})
    return path


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    """One budget of each, small enough for the tensors."""
    sizes = {"local": {"local_context": 16}, "sbcluster": {"local_context": 16, "num_landmarks": 8}}
    few = {name: (sizes.get(name, budgets[0]),) for name, budgets in frontier.BUDGETS.items()}
    monkeypatch.setattr(frontier, "BUDGETS", few)


def options(tensors, *others):
    return [
        *("--tensors", str(tensors), "--device", "cpu", "--dim", str(DIM), "--repeats", "2", "--methods", METHODS),
        *("--lengths", "64,128", "--batch", "2,1", *map(str, others)),
    ]


def test_a_row_for_each_point_and_error(tensors, tmp_path, capsys):
    output, figure = tmp_path / "frontier.json", tmp_path / "frontier.png"
    assert main(options(tensors, "--output", output, "--figure", figure)) == 0
    content = json.loads(output.read_text())
    assert content["complete"]
    found = [(row["method"], row["batch"], row["length"]) for row in content["results"]]
    assert found == [(name, *size) for size in ((2, 64), (1, 128)) for name in ("full", "local", "sbcluster")]
    for row in content["results"]:
        assert set(row) == POINT
        assert min(row["milliseconds"], row["ratio_to_full"], row["mebibytes"], row["gigaoperations"]) > 0
        assert row["error"] == pytest.approx(
            np.mean([x["error"] for x in content["errors"] if x["method"] == row["method"]])
        )
    assert [row["columns"] for row in content["results"]] == [64, 16, 24, 128, 16, 24]
    errors = {(row["network"], row["layer"], row["method"]): row["error"] for row in content["errors"]}
    assert set(errors) == {("tiny", x, name) for x in "03" for name in ("full", "local", "sbcluster", "pisa")}
    assert errors["tiny", "0", "full"] < 1e-6 < 0.1 < errors["tiny", "0", "local"]
    assert {row["name"] for row in content["skipped"]} == {"pisa"}, "its kernel is not here"
    with np.load(tensors) as file:
        query, key, value = (torch.from_numpy(file[f"{kind}3"]).double() for kind in "qkv")
    reference = torch.einsum(
        "bhts,bshd->bthd", (DIM**-0.5 * torch.einsum("bthe,bshe->bhts", query, key)).softmax(-1), value
    )
    out = create_attention("local", LENGTH, DIM, local_context=16)(query, key, value)[0]
    expected = ((out - reference).norm(dim=(1, 3)) / reference.norm(dim=(1, 3))).mean().item()
    assert errors["tiny", "3", "local"] == pytest.approx(expected, rel=1e-5), "heads are samples"
    with Image.open(figure) as image:
        assert image.format == "PNG"
    assert "pisa left out at N = 64, 128: its kernel needs CUDA and --pisa." in capsys.readouterr().out


def test_the_figure_has_a_line_for_each_method(tensors):
    bench = frontier.FrontierBench(build_parser().parse_args(options(tensors)))
    bench.errors = [
        row for network, layer, inputs in bench.layers for row in bench.layer_errors(network, layer, inputs)
    ]
    for length, ratio in ((64, 0.5), (128, 0.25)):
        for name, sizes in bench.points[:3]:
            bench.results.append({"method": name, "sizes": sizes, "length": length, "ratio_to_full": ratio})
    panels = bench.draw().axes
    assert [axes.get_title() for axes in panels] == [
        "tiny, 80 tokens\ntime at 2 × 64",  # noqa: RUF001
        "mean of the networks\ntime at 2 × 64",  # noqa: RUF001
        "mean of the networks\ntime at 1 × 128",  # noqa: RUF001
    ]
    lines = [line for line in panels[2].get_lines() if len(line.get_xdata()) == 1]
    assert [line.get_xdata()[0] for line in lines] == [0.25, 0.25]
    means = [np.mean([row["error"] for row in bench.errors if row["method"] == name]) for name, _ in bench.points[1:3]]
    assert [line.get_ydata()[0] for line in lines] == pytest.approx(means)
    assert [text.get_text() for text in panels[2].texts] == ["sbcluster", "local"]


def test_the_line_of_adaptive_attention_has_the_points_that_no_other_is_better_than(tensors, monkeypatch):
    budgets = [
        {"local_context": 16, "num_landmarks": 8, "num_query_landmarks": 4, "density": x} for x in (0.0, 0.1, 0.3)
    ]
    monkeypatch.setitem(frontier.BUDGETS, "sbadaptive", tuple(budgets))
    arguments = [*options(tensors), "--methods", "sbadaptive"]
    bench = frontier.FrontierBench(build_parser().parse_args(arguments))
    for sizes, ratio, error in zip(budgets, (0.2, 0.3, 0.1), (0.5, 0.6, 0.7), strict=True):
        row = {"method": "sbadaptive", "sizes": sizes, "network": "tiny", "length": 64}
        bench.results.append(row | {"ratio_to_full": ratio})
        bench.errors.append(row | {"error": error})
    lines = [line.get_xydata().tolist() for line in bench.draw().axes[0].get_lines()]
    assert [[0.1, 0.7], [0.2, 0.5]] in lines


def test_an_interrupted_run_is_resumed(tensors, tmp_path, monkeypatch):
    output = tmp_path / "frontier.json"
    assert main(options(tensors, "--output", output)) == 0
    whole = json.loads(output.read_text())
    parts = {"complete": False, "results": whole["results"][:2], "errors": whole["errors"][:4]}
    output.write_text(json.dumps(whole | parts))
    measured, measure = [], frontier.FrontierBench.measure_point
    monkeypatch.setattr(
        frontier.FrontierBench,
        "measure_point",
        lambda bench, name, *others: measured.append(name) or measure(bench, name, *others),
    )
    assert main(options(tensors, "--output", output)) == 0
    assert measured == ["sbcluster", "pisa", "full", "local", "sbcluster", "pisa"]
    resumed = json.loads(output.read_text())
    assert resumed["complete"]
    assert resumed["results"][:2] == whole["results"][:2]
    assert resumed["errors"] == whole["errors"]


def test_errors_and_times_of_two_runs(tensors, tmp_path, monkeypatch, capsys):
    errors, output, figure = (tmp_path / name for name in ("errors.json", "frontier.json", "frontier.png"))
    with monkeypatch.context() as patch:
        patch.setattr(frontier.FrontierBench, "measure_times", lambda *_: pytest.fail("times are measured"))
        assert main(options(tensors, "--errors-only", "--output", errors)) == 0
    assert "sbcluster" in capsys.readouterr().out
    content = json.loads(errors.read_text())
    assert content["complete"]
    assert not content["results"]
    without = options(tensors)[2:]  # no --tensors
    with monkeypatch.context() as patch:
        patch.setattr(frontier.FrontierBench, "layer_errors", lambda *_: pytest.fail("errors are measured"))
        assert main([*without, "--errors", str(errors), "--output", str(output), "--figure", str(figure)]) == 0
    found = json.loads(output.read_text())
    assert found["complete"]
    assert found["errors"] == content["errors"]
    for row in found["results"]:
        assert row["error"] == pytest.approx(
            np.mean([x["error"] for x in content["errors"] if x["method"] == row["method"]])
        )
    capsys.readouterr()
    for others, message in (
        (("--dtype", "bfloat16"), "has errors in float32, not in bfloat16."),
        (("--methods", "cluster"), "lacks cluster C 32 of tiny, layer 0."),
        (("--errors-only",), "--errors replaces --checkpoint, --data-dir, --tensors and --errors-only"),
    ):
        assert main([*without, "--errors", str(errors), *others]) == 1
        assert message in capsys.readouterr().err


def test_times_are_written_before_errors_are_known(tensors, tmp_path, monkeypatch, capsys):
    output, figure = tmp_path / "frontier.json", tmp_path / "frontier.png"

    def interrupt(*_):
        assert len(json.loads(output.read_text())["results"]) == 6, "each time is written"
        raise KeyboardInterrupt

    monkeypatch.setattr(frontier.FrontierBench, "layer_errors", interrupt)
    assert main(options(tensors, "--output", output, "--figure", figure)) == 1
    assert "Interrupted. Missing: errors." in capsys.readouterr().err
    found = json.loads(output.read_text())
    assert not found["complete"]
    assert len(found["results"]) == 6
    assert {row["error"] for row in found["results"]} == {None}


def test_operations_and_columns():
    def found(name, **sizes):
        return frontier.columns_and_operations(name, sizes, 1024, 64)

    full = 4 * 1024**2 * 64
    assert found("full") == (1024, full)
    assert found("flex-window", local_context=128) == found("local", local_context=128) == (128, full / 8)
    # two of 16 blocks; means of 16 blocks for a query, moments of 64 x 64 for a key and a query, and the choice
    choice, moments = 2 * 16**2 * 64, 4 * 1024 * 64**2
    assert found("topk-blocks", density=0.15) == (128, full / 8 + choice)
    assert found("pisa", density=0.15) == (144, full / 8 + full / 64 + choice + moments)
    steps = create_attention("cluster", 1024, num_landmarks=32).num_steps
    assert found("cluster", num_landmarks=32) == (32, full / 32 + 2 * (steps + 1) * 1024 * 32 * 64)
    # a window of 64, landmarks, 81 chosen keys; one step of k-means for keys and queries; the choice
    sizes = {"local_context": 64, "num_landmarks": 128, "num_query_landmarks": 48, "density": 0.08}
    columns, operations = found("sbadaptive", **sizes)
    assert columns == 64 + 128 + 48 + 81 + 48 * 81 / 1024
    assert operations == 2 * 1024 * 64 * (2 * (64 + 128 + 81) + 2 * (128 + 48) + 48)
    # projections of queries and keys, sums over keys, averages
    assert found("performer", nb_features=64)[1] == 8 * 1024 * 64 * 64


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "other.npz").write_bytes(b"none")
    np.savez(tmp_path / "part.npz", q0=np.zeros((1, 4, 1, 8)))
    for given, message in (
        ([], "There is nothing to measure the error on. Give --checkpoint and --data-dir, or --tensors."),
        (["--tensors", f"{tmp_path}/other.npz"], "other.npz holds no q<layer>, k<layer>, v<layer>"),
        (["--tensors", f"{tmp_path}/part.npz"], "part.npz holds no q<layer>, k<layer>, v<layer>"),
        (["--methods", "sbclusters"], "'sbclusters' is unknown. Did you mean"),
    ):
        assert main([*given, "--device", "cpu"]) == 1
        assert message in capsys.readouterr().err
