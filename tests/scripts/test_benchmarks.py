"""The benchmark and the precision script: what they measure, what they leave, and how they fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import benchmark_attention as benchmark
from scripts import measure_precision as precision
from src.models.modules.attention import ATTENTIONS

SMALL = ["--device", "cpu", "--threads", "1", "--dim", "16", "--batch", "2"]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def benchmark_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    files = ["--output", str(folder / "times.json"), "--figure", str(folder / "times.png")]
    threads = torch.get_num_threads()
    status = benchmark.main([*SMALL, "--lengths", "64,128", "--repeats", "2", "--memory-fraction", "1/4", *files])
    assert status == 0
    assert torch.get_num_threads() == threads
    return folder


@pytest.fixture(scope="module")
def times(benchmark_files):
    return read(benchmark_files / "times.json")


def rows(times, **wanted):
    return [row for row in times["results"] if all(row[key] == value for key, value in wanted.items())]


@pytest.mark.parametrize("attention_pass", benchmark.PASSES)
@pytest.mark.parametrize("length", [64, 128])
def test_every_attention_is_timed(times, length, attention_pass):
    found = rows(times, length=length, kind="attention") and rows(times, length=length, **{"pass": attention_pass})
    by_name = {row["name"]: row for row in found}
    assert set(ATTENTIONS) <= set(by_name)
    assert {"SDPA", "softmax written out"} <= set(by_name)
    for row in found:
        assert row["ratio_to_sdpa"] > 0
        assert 0 < row["milliseconds_min"] <= row["milliseconds"]
        assert len(row["milliseconds_per_round"]) == 2
        assert row["temporary_bytes"] >= 2 * length * 16 * 4, "the output at least"
    assert by_name["SDPA"]["ratio_to_sdpa"] == 1
    assert by_name["sblocal"]["window"] == length // 8
    assert by_name["local"]["window"] == length // 4
    assert by_name["sblocal"]["memory_fraction"] <= 1 / 4


def test_sizes_are_kept_for_the_growth(times):
    assert times["settings"]["growth_length"] == 128
    (kept,) = rows(times, name="sblocal as at 128", **{"pass": "forward"})
    (own,) = rows(times, name="sblocal", length=128, **{"pass": "forward"})
    assert (kept["length"], kept["window"], kept["features"]) == (64, own["window"], own["features"])
    grown = {(row["name"], row["pass"]) for row in times["growth"]}
    assert grown == {(name, x) for name in ("SDPA", *ATTENTIONS) for x in benchmark.PASSES}
    assert all(row["factor"] > 0 for row in times["growth"])


def test_machine_settings_and_figure(times, benchmark_files):
    assert times["machine"]["threads"] == 1
    assert times["machine"]["torch"] == torch.__version__
    assert times["settings"]["memory_fraction"] == 1 / 4
    assert (benchmark_files / "times.png").read_bytes().startswith(b"\x89PNG")


def test_memory_of_the_cpu_is_the_peak_of_live_bytes():
    x = torch.zeros(1 << 16)

    def call():
        # three buffers in turn, of which two are alive at any one time
        return x.add(1).add(1).add(1)

    buffers = benchmark.peak_bytes(call, torch.device("cpu")) / (4 * x.numel())
    assert 2 <= buffers < 2.01, "the rest are scalars"


def test_a_batch_for_each_length(tmp_path, capsys):
    output = tmp_path / "figures.json"
    options = ["--device", "cpu", "--threads", "1", "--dim", "16", "--attentions", "local", "--passes", "forward"]
    options += ["--lengths", "128,32,64", "--batch", "4,2,2", "--repeats", "1", "--no-peers", "--output", str(output)]
    assert benchmark.main(options) == 0
    figures = json.loads(output.read_text())
    text = " ".join(capsys.readouterr().out.split())
    for length, batch in {32: 4, 64: 2, 128: 2}.items():
        assert f"N = {length}, forward: float32 on cpu, batch {batch}," in text
        assert benchmark.Bench(benchmark.build_parser().parse_args(options)).inputs(length)[0].shape[0] == batch
    # growth from one batch to another would be that of the batch
    assert {(row["from"], row["to"]) for row in figures["growth"]} == {(64, 128)}


def test_batches_that_do_not_match_the_lengths(capsys):
    assert benchmark.main([*SMALL[:-2], "--lengths", "32,64,128", "--batch", "1,2"]) == 1
    assert "--batch has 2 numbers and there are 3 lengths" in capsys.readouterr().err


def test_sblocal_holds_no_matrix_of_queries_by_keys():
    arguments = benchmark.build_parser().parse_args(["--device", "cpu", "--lengths", "1568", "--batch", "1"])
    bench = benchmark.Bench(arguments)
    matrix = 4 * 1568**2
    peaks = {}
    for name in ("sblocal", "local", "performer"):
        candidate = bench.attention(name, 1568, 1568)
        peaks[name] = benchmark.peak_bytes(bench.call(candidate, bench.inputs(1568), "forward"), bench.device)
    written_out = benchmark.Candidate("", "peer", benchmark.heads_first(benchmark.softmax_written_out))
    full = benchmark.peak_bytes(bench.call(written_out, bench.inputs(1568), "forward"), bench.device)
    assert full >= matrix
    assert max(peaks.values()) < 0.7 * matrix, peaks


@pytest.mark.parametrize("name", ["local", "sblocal"])
def test_peers_compute_what_they_are_compared_with(name):
    pytest.importorskip("fast_transformers")
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 70, 2, 16).unbind()
    (peer,) = benchmark.fast_transformers_peers(query.shape, torch.device("cpu"), {name: (9, 12)})
    options = {"local_context": 9} if name == "local" else {"local_context": 9, "nb_features": 12}
    ours = benchmark.create_attention(name, 70, 16, **options)(query, key, value)[0]
    torch.testing.assert_close(peer.function(query, key, value), ours, rtol=1e-4, atol=1e-5)


def test_large_matrices_are_left_out_and_named(tmp_path, capsys):
    options = ["--lengths", "64", "--repeats", "1", "--passes", "forward", "--attentions", "full"]
    output = tmp_path / "times.json"
    assert benchmark.main([*SMALL, *options, "--memory-limit", "1e-5", "--output", str(output)]) == 0
    times = read(output)
    assert not rows(times, name="softmax written out")
    assert ("softmax written out", 64, "forward") in {(x["name"], x["length"], x["pass"]) for x in times["skipped"]}
    assert "softmax written out left out at N = 64" in capsys.readouterr().out


def test_fewer_peers_and_half_precision(tmp_path):
    output = tmp_path / "times.json"
    options = ["--lengths", "64", "--repeats", "1", "--passes", "forward", "--no-peers", "--dtype", "bfloat16"]
    assert benchmark.main([*SMALL, *options, "--output", str(output)]) == 0
    assert {row["name"] for row in read(output)["results"]} == {"SDPA", *ATTENTIONS}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--attentions", "sblocl"], ["sblocl", "sblocal"]),
        (["--passes", "backward"], ["backward", "forward, training"]),
        (["--lengths", "64,x"], ["--lengths", "'x'"]),
        (["--memory-fraction", "1/0"], ["--memory-fraction", "1/0"]),
        (["--memory-fraction", "2"], ["memory_fraction=2.0"]),
        (["--dtype", "float8"], ["--dtype", "float8"]),
        (["--no-such-option"], ["--no-such-option", "--help"]),
        (["--figure", "times.doc"], ["times.doc", ".png"]),
        (["--output", "no/such/folder/times.json"], ["no/such/folder/times.json"]),
    ],
)
def test_wrong_options_of_the_benchmark(options, words, capsys):
    assert benchmark.main(["--device", "cpu", *options]) == 1
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("Error: ")
    assert all(word in captured.err for word in words), captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("script", [benchmark, precision])
def test_absent_cuda_is_named(script, capsys):
    assert script.main(["--device", "cuda"]) == 1
    assert "--device cpu" in capsys.readouterr().err


BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


def test_precision(tmp_path, capsys):
    output = tmp_path / "precision.json"
    options = ["--length", "128", "--batch", "1", "--threads", "1"]
    assert precision.main(["--device", "cpu", *options, "--output", str(output)]) == 0
    content = read(output)
    results = content["results"]
    cases = {(row["attention"], row["dtype"], row["inputs"], row["tensor"]) for row in results}
    assert len(cases) == len(results) == len(ATTENTIONS) * len(BOUNDS) * 2 * len(precision.TENSORS)
    for row in results:
        assert row["non_finite"] == 0
        assert row["max_abs"] >= 0
        assert 0 < row["relative_l2"] < BOUNDS[row["dtype"]], row
        assert row["largest_logit"] == 50 or row["inputs"] == "ordinary"
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*ATTENTIONS, *BOUNDS))


def test_figures_that_are_not_finite_fail(tmp_path, capsys, monkeypatch):
    genuine = precision.outputs

    def broken(module, tensors):
        found = genuine(module, tensors)
        if tensors[0].dtype != torch.float64:
            found[1][0, 0, 0, :3] = torch.nan
        return found

    monkeypatch.setattr(precision, "outputs", broken)
    output = tmp_path / "precision.json"
    options = ["--device", "cpu", "--length", "32", "--dim", "8", "--attentions", "local", "--dtypes", "float32"]
    assert precision.main([*options, "--output", str(output)]) == 1
    assert "local in float32" in capsys.readouterr().err
    broken_rows = [row for row in read(output)["results"] if row["tensor"] == "gradient of query"]
    assert [(row["non_finite"], row["max_abs"]) for row in broken_rows] == [(3, None), (3, None)]


@pytest.mark.parametrize("options", [["--dtypes", "float12"], ["--logits", "0"], ["--attentions", "ful"]])
def test_wrong_options_of_precision(options, capsys):
    assert precision.main(["--device", "cpu", *options]) == 1
    captured = capsys.readouterr()
    assert not captured.out
    assert options[1] in captured.err


@pytest.mark.parametrize("script", [benchmark, precision])
def test_scripts_run_from_any_folder(script, tmp_path):
    command = [sys.executable, str(Path(script.__file__)), "--threads", "none"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
