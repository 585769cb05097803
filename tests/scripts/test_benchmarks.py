"""The benchmark and the precision script: what they measure, what they leave, and how they fail."""

import contextlib
import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scatterbrain.attention import ATTENTIONS, COMPARED, create_attention
from scripts import benchmark_attention as benchmark
from src.analysis import tools
from src.analysis.benchmark import attention, attention_report, baselines
from src.analysis.benchmark.attention import AttentionBench
from src.analysis.benchmark.timing import seconds_per_call
from src.evaluation.colours import ATTENTION_COLOURS
from src.evaluation.result_rows import write_rows
from src.utils.peak_memory import peak_bytes
from tests.scatterbrain.ops import precision

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


@pytest.mark.parametrize("attention_pass", tools.PASSES)
@pytest.mark.parametrize("length", [64, 128])
def test_every_attention_is_timed(times, length, attention_pass):
    found = rows(times, length=length, kind="attention") and rows(times, length=length, **{"pass": attention_pass})
    by_name = {row["name"]: row for row in found}
    assert set(COMPARED) <= set(by_name)
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


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """Results and tables of attentions whose sizes are neither a window nor features, and of two that have some."""
    output, text = tmp_path_factory.mktemp("clustered") / "times.json", io.StringIO()
    options = ["--attentions", "full,cluster,pairedcluster,sbpairedcluster,sbcluster,bs-bigbird", "--no-baselines"]
    options += ["--lengths", "64,128", "--passes", "forward", "--repeats", "1", "--memory-fraction", "1/4"]
    with contextlib.redirect_stdout(text):
        assert benchmark.main([*SMALL, *options, "--output", str(output)]) == 0
    return read(output), text.getvalue()


def test_sizes_of_any_name_are_reported_and_kept_for_the_growth(clustered):
    times, _ = clustered
    for name in times["settings"]["attentions"]:
        own = {row["length"]: row for row in rows(times, name=name)}
        for length, row in own.items():
            module = create_attention(name, length, 16, memory_fraction=1 / 4)
            assert row["sizes"] == module.sizes()
            assert row["window"] == row["sizes"].get("local_context", 0)
            assert row["features"] == row["sizes"].get("nb_features", 0)
        kept = rows(times, kind="growth", name=f"{name} as at 128")
        assert len(kept) == (name != "full"), "where there is nothing to keep, there is no row of its own"
        for row in kept:
            assert (row["length"], row["sizes"]) == (64, own[128]["sizes"])
            module = create_attention(name, 128, 16, memory_fraction=1 / 4)
            assert row["memory_fraction"] == min(1, module.memory_columns(64) / 64)
    assert rows(times, name="cluster", length=64)[0]["sizes"] != rows(times, name="cluster", length=128)[0]["sizes"]


def test_the_training_pass_of_every_attention(tmp_path):
    output = tmp_path / "times.json"
    options = ["--attentions", ",".join(ATTENTIONS), "--lengths", "64", "--passes", "training", "--repeats", "1"]
    assert benchmark.main([*SMALL, *options, "--no-baselines", "--output", str(output)]) == 0
    times = read(output)
    assert {row["name"] for row in rows(times, kind="attention")} == set(ATTENTIONS)
    assert times["skipped"] == []


def test_growth_only(tmp_path):
    output = tmp_path / "times.json"
    options = ["--lengths", "64,128,256", "--growth-length", "128", "--growth-only", "--passes", "forward"]
    options += ["--attentions", "full,local,pairedcluster", "--repeats", "1", "--no-baselines", "--output", str(output)]
    assert benchmark.main([*SMALL, *options]) == 0
    times = read(output)
    names = {length: {row["name"] for row in rows(times, length=length)} for length in (64, 128, 256)}
    kept = {"SDPA", "full", "local as at 128", "pairedcluster as at 128"}
    assert names == {64: kept, 128: {"SDPA", "full", "local", "pairedcluster"}, 256: kept}


def test_given_sizes_are_those_of_all_lengths(tmp_path):
    output = tmp_path / "times.json"
    options = [
        "--lengths",
        "64,128",
        "--passes",
        "forward",
        "--repeats",
        "1",
        "--no-baselines",
        "--output",
        str(output),
    ]
    options += ["--attentions", "full,cluster,sbcluster,sbadaptive"]
    options += ["--sizes", "local_context=8,num_landmarks=12,num_query_landmarks=5,density=0.25"]
    assert benchmark.main([*SMALL, *options]) == 0
    sizes = {(row["name"], row["length"]): row["sizes"] for row in rows(read(output), kind="attention")}
    for length in (64, 128):
        assert sizes["full", length] == {}
        assert sizes["cluster", length] == {"num_landmarks": 12}
        assert sizes["sbcluster", length] == {"local_context": 8, "num_landmarks": 12}
        both = {"num_query_landmarks": 5, "density": 0.25}
        assert sizes["sbadaptive", length] == {"local_context": 8, "num_landmarks": 12, **both}
    assert not rows(read(output), kind="growth")


def test_tables_have_all_sizes(clustered):
    times, text = clustered
    lines = [line.split() for line in text.splitlines()]
    of_cluster, *_ = (line for line in lines if line[1:2] == ["cluster"])
    assert of_cluster[3:10:2] == ["-", "-", "C", "\u2502"]
    for name, letters in {"pairedcluster": "CQ", "sbpairedcluster": "CQX"}.items():
        (row,) = rows(times, name=name, length=128)
        expected = ", ".join(f"{letter} {size}" for letter, size in zip(letters, row["sizes"].values(), strict=True))
        assert sum(f" {expected} " in line for line in text.splitlines()) >= 2, "its own, and as it is kept for N = 64"
    assert " block 16 " in text
    assert "C clusters of keys, Q of queries" in " ".join(text.split())


def test_tables_without_clusters_speak_of_none(capsys):
    assert benchmark.main([*INTERRUPTIBLE, "--passes", "forward"]) == 0
    printed = capsys.readouterr().out
    assert "W keys in the window, M features;" in printed
    assert "others" not in printed


def test_machine_settings_and_figure(times, benchmark_files):
    assert times["machine"]["threads"] == 1
    assert times["machine"]["torch"] == torch.__version__
    assert times["settings"]["memory_fraction"] == 1 / 4
    assert not {"output", "figure"} & set(times["settings"]), "paths of this machine are no part of the results"
    assert times["complete"] is True
    assert (benchmark_files / "times.png").read_bytes().startswith(b"\x89PNG")


def test_memory_of_the_cpu_is_the_peak_of_live_bytes():
    x = torch.zeros(1 << 16)

    def call():
        # three buffers in turn, of which two are alive at any one time
        return x.add(1).add(1).add(1)

    buffers = peak_bytes(call, torch.device("cpu")) / (4 * x.numel())
    assert 2 <= buffers < 2.01, "the rest are scalars"


def test_a_batch_for_each_length(capsys):
    options = ["--device", "cpu", "--threads", "1", "--dim", "16", "--attentions", "local", "--passes", "forward"]
    options += ["--lengths", "128,32,64", "--batch", "4,2,2", "--repeats", "1", "--no-baselines"]
    assert benchmark.main(options) == 0
    text = " ".join(capsys.readouterr().out.split())
    for length, batch in {32: 4, 64: 2, 128: 2}.items():
        assert f"N = {length}, forward: float32 on cpu, batch {batch}," in text
        assert AttentionBench(benchmark.build_parser().parse_args(options)).inputs(length)[0].shape[0] == batch


def test_batches_that_do_not_match_the_lengths(capsys):
    assert benchmark.main([*SMALL[:-2], "--lengths", "32,64,128", "--batch", "1,2"]) == 1
    assert "--batch has 2 numbers and there are 3 lengths" in capsys.readouterr().err


def test_sblocal_holds_no_matrix_of_queries_by_keys():
    arguments = benchmark.build_parser().parse_args(["--device", "cpu", "--lengths", "1568", "--batch", "1"])
    bench = AttentionBench(arguments)
    matrix = 4 * 1568**2
    peaks = {}
    for name in ("sblocal", "local", "performer"):
        candidate = bench.attention(name, 1568, 1568)
        peaks[name] = peak_bytes(bench.call(candidate, bench.inputs(1568), "forward"), bench.device)
    written_out = attention.Candidate("", "baseline", baselines.heads_first(baselines.softmax_written_out))
    full = peak_bytes(bench.call(written_out, bench.inputs(1568), "forward"), bench.device)
    assert full >= matrix
    assert max(peaks.values()) < 0.7 * matrix, peaks


@pytest.mark.parametrize("name", ["local", "sblocal"])
def test_baselines_compute_what_they_are_compared_with(name):
    pytest.importorskip("fast_transformers")
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 70, 2, 16).unbind()
    found = baselines.fast_transformers_baselines(query.shape, torch.device("cpu"), {name: (9, 12)})
    options = {"local_context": 9} if name == "local" else {"local_context": 9, "nb_features": 12}
    ours = create_attention(name, 70, 16, **options)(query, key, value)[0]
    torch.testing.assert_close(found[name][1](query, key, value), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("device_times", "drawn", "unit"),
    [
        ((None, None), [3.0, 1.25], "milliseconds per sequence"),
        ((0.5, 2.0), [0.5, 0.5], "milliseconds of the device per sequence"),
    ],
)
def test_the_figure_shows_what_the_device_takes_where_that_is_known(device_times, drawn, unit):
    made = [
        {
            "name": "full",
            "kind": "attention",
            "length": length,
            "pass": "forward",
            "device_milliseconds": of_device,
            "milliseconds_per_round": [slow, slow, 9.0],
        }
        for length, slow, of_device in zip((64, 128), (3.0, 5.0), device_times, strict=True)
    ]
    arguments = SimpleNamespace(
        passes=("forward",), lengths=(64, 128), batch=(1, 4), dtype="bfloat16", heads=1, growth_length=64
    )
    batches = {64: 1, 128: 4}
    bench = SimpleNamespace(arguments=arguments, results=made, batches=batches, device=torch.device("cpu"))
    (axis,) = attention_report.AttentionReport.draw(bench).axes
    assert axis.get_lines()[0].get_ydata().tolist() == drawn
    assert axis.get_ylabel() == unit


def test_the_host_time_of_eager_calls_stands_beside_the_device_time(times, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    seconds = seconds_per_call(lambda: calls.append("call"), 3, torch.device("cuda"), of_host=True)
    assert calls == ["synchronize", "call", "call", "call"]
    assert 0 < seconds < 1

    made = [row | {"device_milliseconds": 0.25, "host_microseconds": 117.0} for row in rows(times, length=64)]
    made = [row for row in made if row["pass"] == "forward"]
    bench = AttentionBench(benchmark.build_parser().parse_args(["--lengths", "64", "--device", "cpu"]))
    for device, named in (("cpu", False), ("cuda", True)):
        bench.device = torch.device(device)
        headers = [column.header for column in bench.pass_table(made).columns]
        assert ("host\nµs" in headers, "device\nms" in headers) == (named, named)
    host = headers.index("host\nµs")
    assert set(bench.pass_table(made).columns[host].cells) == {"117"}


def test_inputs_without_fallback_tiles_have_a_row_of_their_own(tmp_path, capsys, monkeypatch):
    options = [*SMALL, "--attentions", "sblocal,local", "--passes", "forward", "--lengths", "64", "--repeats", "1"]
    options += ["--no-baselines", "--output", str(tmp_path / "times.json"), "--figure", str(tmp_path / "times.png")]
    bench = AttentionBench(benchmark.build_parser().parse_args(options))
    counts = {float(bench.inputs(64, seed)[0][0, 0, 0, 0]): count for seed, count in enumerate((2, 1, 0))}
    assert len(counts) == 3, "each seed gives others"
    outputs = []

    def fallback_tiles(module, tensors):
        return counts[float(tensors[0][0, 0, 0, 0])] if "nb_features" in module_sizes(module) else None

    def module_sizes(module):
        return {} if module is None else module.sizes()

    genuine = AttentionBench.call
    monkeypatch.setattr(attention, "fallback_tiles", fallback_tiles)
    monkeypatch.setattr(
        AttentionBench, "call", lambda *arguments: outputs.append(arguments[1:3]) or genuine(*arguments)
    )
    assert benchmark.main(options) == 0
    times = read(tmp_path / "times.json")
    found = {row["name"]: (row["seed"], row["fallback_tiles"], row["kind"]) for row in times["results"]}
    assert found == {
        "SDPA": (0, None, "baseline"),
        "sblocal": (0, 2, "attention"),
        "sblocal, no fallback": (2, 0, "seed"),
        "local": (0, None, "attention"),
    }
    inputs = {candidate.name: tensors for candidate, tensors in outputs}
    assert torch.equal(inputs["sblocal, no fallback"][0], bench.inputs(64, 2)[0])
    assert "fallback: tiles of queries that the kernels recompute exactly" in " ".join(capsys.readouterr().out.split())


def test_tiles_are_counted_where_the_kernels_run():
    bench = AttentionBench(benchmark.build_parser().parse_args([*SMALL, "--lengths", "64"]))
    modules = [bench.attention(name, 64, 64).module for name in ("sblocal", "local")]
    assert [attention.fallback_tiles(module, bench.inputs(64)) for module in (*modules, None)] == [None] * 3


def test_large_matrices_are_left_out_and_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attention, "MATRICES_GIB", 1e-5)
    options = ["--lengths", "64", "--repeats", "1", "--passes", "forward", "--attentions", "full"]
    output = tmp_path / "times.json"
    assert benchmark.main([*SMALL, *options, "--output", str(output)]) == 0
    times = read(output)
    assert not rows(times, name="softmax written out")
    assert ("softmax written out", 64, "forward") in {(x["name"], x["length"], x["pass"]) for x in times["skipped"]}
    assert "softmax written out left out at N = 64" in capsys.readouterr().out


def test_fewer_baselines_and_half_precision(tmp_path):
    output = tmp_path / "times.json"
    options = ["--lengths", "64", "--repeats", "1", "--passes", "forward", "--no-baselines", "--dtype", "bfloat16"]
    assert benchmark.main([*SMALL, *options, "--output", str(output)]) == 0
    assert {row["name"] for row in read(output)["results"]} == {"SDPA", *COMPARED}


INTERRUPTIBLE = [*SMALL, "--lengths", "32,64", "--attentions", "local", "--repeats", "1", "--no-baselines"]


def stop_at(monkeypatch, measurement, number, folder):
    """Send a signal in the middle of a measurement; what is in the folder's file when each begins."""
    genuine, contents = AttentionBench.measure, []

    def measure(bench, candidates, attention_pass):
        output = folder / "times.json"
        contents.append(read(output) if output.exists() else None)
        rows = genuine(bench, candidates, attention_pass)
        if len(contents) == measurement:
            signal.raise_signal(number)
        return rows

    monkeypatch.setattr(AttentionBench, "measure", measure)
    return contents


def measured(times):
    return sorted({(row["length"], row["pass"]) for row in times["results"]})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("groups", "measurement", "complete", "missing"),
    [
        ([(32, 64)], 2, [(32, "forward"), (64, "forward")], "training at N = 32, training at N = 64"),
        ([(32,), (64,)], 2, [(32, "forward")], "training at N = 32, forward at N = 64, training at N = 64"),
        ([(32,), (64,)], 4, [(32, "forward"), (32, "training"), (64, "forward")], "training at N = 64"),
    ],
)
def test_what_is_complete_outlives_a_signal(
    groups, measurement, complete, missing, number, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(AttentionBench, "measured_together", lambda bench: groups)
    contents = stop_at(monkeypatch, measurement, number, tmp_path)
    genuine = AttentionBench.draw

    def draw(*arguments):
        signal.raise_signal(number)  # they often come twice
        return genuine(*arguments)

    monkeypatch.setattr(AttentionBench, "draw", draw)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    output, figure = tmp_path / "times.json", tmp_path / "times.png"
    assert benchmark.main([*INTERRUPTIBLE, "--output", str(output), "--figure", str(figure)]) == 1
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == f"Interrupted. Missing: {missing}."
    for each in [(n, name) for n in (32, 64) for name in tools.PASSES]:
        assert ("N = {}, {}:".format(*each) in printed.out) == (each in complete)
    times = read(output)
    assert times["complete"] is False
    assert measured(times) == complete
    for each in complete:
        names = {row["name"] for row in times["results"] if (row["length"], row["pass"]) == each}
        assert {"SDPA", "local"} <= names, "whole tables only"
    assert figure.read_bytes().startswith(b"\x89PNG")
    # what would be left if the process had been killed on the way
    assert contents[0] is None
    assert contents[1]["complete"] is False
    assert measured(contents[1]) == [x for x in complete if x[1] == "forward"][: len(groups[0])]
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith(".")] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_written_where_nothing_is_complete(number, monkeypatch, tmp_path, capsys):
    stop_at(monkeypatch, 1, number, tmp_path)
    files = ["--output", str(tmp_path / "times.json"), "--figure", str(tmp_path / "times.png")]
    assert benchmark.main([*INTERRUPTIBLE, *files]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "Interrupted. Nothing was written."
    assert not captured.out
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_on_the_way_ends_nothing(monkeypatch, tmp_path):
    calls = []

    def write(path, content):
        calls.append(content["complete"])
        if not content["complete"]:
            raise OSError(28, "No space left on device")
        write_rows(path, content)

    monkeypatch.setattr(tools, "write_rows", write)  # while it runs, and at the end
    assert benchmark.main([*INTERRUPTIBLE, "--output", str(tmp_path / "times.json")]) == 0
    assert calls == [False, True, True]
    assert read(tmp_path / "times.json")["complete"] is True


def test_on_cuda_each_length_is_measured_on_its_own():
    bench = AttentionBench(benchmark.build_parser().parse_args(INTERRUPTIBLE))
    assert bench.measured_together() == [(32, 64)]
    bench.device = torch.device("cuda")
    assert bench.measured_together() == [(32,), (64,)]


def test_colours_are_those_of_all_figures():
    for name, value in ATTENTION_COLOURS.items():
        for like in ("{}", "{} as at 3136", "{}, no fallback", "published {}"):
            assert attention_report.colour(like.format(name)) == value
    assert attention_report.colour("fast-transformers local") == ATTENTION_COLOURS["local"]
    others = [attention_report.colour(name) for name in ("SDPA", "SDPA flash", "softmax written out")]
    assert others == ["black", "grey", "silver"]


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
    assert len(cases) == len(results) == len(COMPARED) * len(BOUNDS) * 2 * len(precision.TENSORS)
    for row in results:
        assert row["non_finite"] == 0
        assert row["max_abs"] >= 0
        assert 0 < row["relative_l2"] < BOUNDS[row["dtype"]], row
        assert row["largest_logit"] == 50 or row["inputs"] == "ordinary"
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*COMPARED, *BOUNDS))


def test_values_that_are_not_finite_fail(tmp_path, capsys, monkeypatch):
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


def test_the_script_runs_from_any_folder(tmp_path):
    command = [sys.executable, str(Path(benchmark.__file__)), "--threads", "none"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
