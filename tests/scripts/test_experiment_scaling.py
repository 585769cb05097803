"""The experiment of growth: exponents and crossings that are put in come out, and what is no such file is refused."""

from __future__ import annotations

import json

import pytest

from scripts import benchmark_attention as benchmark
from scripts.experiment_scaling import main
from src.analysis.experiments import scaling

LENGTHS = (256, 1024, 4096, 16384)
GROWTH = 4096
# time of one sequence in ms at N = 1024, exponent, and factor that the clock of the device takes off
LAWS = {"SDPA": (1.0, 2.0), "sblocal": (2.0, 1.0), "pairedcluster": (40.0, 0.9)}
SIZES = {"sblocal": {"local_context": 64, "nb_features": 32}, "pairedcluster": {"num_landmarks": 57}}
HOST = 100.0


def row(name, kind, length, milliseconds, full, batch, device, sizes):
    return {
        "name": name,
        "kind": kind,
        "length": length,
        "pass": "forward",
        "window": sizes.get("local_context", 0),
        "features": sizes.get("nb_features", 0),
        "sizes": sizes,
        "temporary_bytes": 2**20 * batch * length // 256,
        "milliseconds": batch * milliseconds + device * HOST,
        "ratio_to_sdpa": (batch * milliseconds + device * HOST) / (batch * full + device * HOST),
        "device_milliseconds": batch * milliseconds if device else None,
    }


def content(device="cpu", batches=(1, 1, 1, 1), laws=LAWS):
    """A file of the benchmark in which times and memory follow laws."""
    rows = []
    for length, batch in zip(LENGTHS, batches, strict=True):
        times = {name: factor * (length / 1024) ** power for name, (factor, power) in laws.items()}
        for name, time in times.items():
            options = (times["SDPA"], batch, device == "cuda")
            if name == "SDPA":
                rows.append(row(name, "baseline", length, time, *options, {}))
                continue
            if length == GROWTH:
                rows.append(row(name, "attention", length, time, *options, SIZES[name]))
                continue
            # with sizes of its own it is another attention, which is not to be taken
            rows.append(row(name, "attention", length, 1e3 * length, *options, {"nb_features": length}))
            rows.append(row(f"{name} as at {GROWTH}", "growth", length, time, *options, SIZES[name]))
        rows.append({**rows[-1], "pass": "training", "milliseconds": 1e9})
    settings = {"device": device, "growth_length": GROWTH, "lengths": list(LENGTHS), "batch": list(batches)}
    return {
        "complete": True,
        "machine": {"processor": "Some CPU", "threads": 2, "gpu": "Some GPU" if device == "cuda" else None},
        "settings": {**settings, "dtype": "float32"},
        "results": rows,
    }


@pytest.fixture
def write(tmp_path):
    def write(value, name="times.json"):
        path = tmp_path / name
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return str(path)

    return write


def cells(text, title):
    """Cells by the first of each line, of the table below a title."""
    lines = text[text.index(title) :].splitlines()
    table = []
    for line in lines:
        if line.startswith("└"):
            break
        if line.startswith("│"):
            table.append([cell.strip() for cell in line.strip("│").split("│")])
    return {first: rest for first, *rest in table}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("batches", [(1, 1, 1, 1), (64, 16, 4, 1)])
def test_exponents_and_crossings_are_those_of_the_laws(write, device, batches):
    found = scaling.read_scaling(write(content(device, batches)))
    assert [line.name for line in found.lines] == list(LAWS)
    assert found.batches == dict(zip(LENGTHS, batches, strict=True))
    for line in found.lines:
        factor, power = LAWS[line.name]
        assert line.clock == ("device" if device == "cuda" else "call")
        assert line.sizes == SIZES.get(line.name, {})
        assert [point.length for point in line.points] == list(LENGTHS)
        for point in line.points:
            assert point.milliseconds == pytest.approx(factor * (point.length / 1024) ** power)
            full = (point.length / 1024) ** 2
            assert point.ratio == pytest.approx(point.milliseconds / full)
            assert point.mebibytes == point.length / 256
        assert line.exponent("milliseconds") == pytest.approx(power)
        assert line.exponent("mebibytes") == pytest.approx(1)
        assert line.exponent("milliseconds", 16384) is None, "a single length has no slope"
    # 2 N and N ** 2 are equal at 2,048; 40 N ** 0.9 is the larger up to 29,300
    assert {line.name: line.faster_from() for line in found.lines} == {
        "SDPA": None,
        "sblocal": 4096,
        "pairedcluster": None,
    }


def test_short_lengths_do_not_count(write):
    value = content()
    for item in value["results"]:
        if item["length"] == 256:
            item["milliseconds"] *= 50
    for line in scaling.read_scaling(write(value)).lines:
        assert line.exponent("milliseconds") == pytest.approx(LAWS[line.name][1])
        assert line.exponent("milliseconds", 256) < LAWS[line.name][1] - 0.5


def test_last_step_is_of_the_two_longest_lengths(write):
    value = content()
    for item in value["results"]:
        if item["length"] < 4096:
            item["milliseconds"] = 7.0
    for line in scaling.read_scaling(write(value)).lines:
        assert line.last_step() == pytest.approx(LAWS[line.name][1])
        assert scaling.Line("", {}, "call", line.points[:1]).last_step() is None


def test_exponent_is_of_least_squares():
    points = [scaling.Point(length, time, 1.0, 1.0) for length, time in ((1024, 1.0), (2048, 4.0), (4096, 4.0))]
    # of the points (0, 0), (1, 2), (2, 2) in powers of two: the slope is that from the first to the last
    assert scaling.Line("", {}, "call", tuple(points)).exponent("milliseconds") == pytest.approx(1)


@pytest.mark.parametrize(
    ("ratios", "first"),
    [((2, 0.9, 0.5), 2), ((0.9, 1.1, 0.5), 3), ((0.9, 0.9, 0.9), 1), ((0.5, 0.5, 1.0), None)],
)
def test_faster_from_holds_for_all_that_are_longer(ratios, first):
    points = tuple(scaling.Point(length, 1.0, ratio, 1.0) for length, ratio in enumerate(ratios, start=1))
    assert scaling.Line("", {}, "call", points).faster_from() == first


def test_one_clock_for_all_points_of_an_attention(write):
    value = content("cuda")
    for item in value["results"]:
        if item["name"] == "sblocal" and item["length"] == GROWTH:
            item["device_milliseconds"] = None  # its graph could not be captured
    clocks = {line.name: line for line in scaling.read_scaling(write(value)).lines}
    assert [line.clock for line in clocks.values()] == ["device", "call", "device"]
    assert clocks["sblocal"].points[0].milliseconds == pytest.approx(HOST + 0.5)
    assert clocks["sblocal"].points[0].ratio == pytest.approx((HOST + 0.5) / (HOST + 1 / 16))


def test_tables_and_figure_of_two_devices(write, tmp_path, capsys):
    slower = {**LAWS, "SDPA": (1.0, 1.5)}
    files = [write(content(), "cpu.json"), write(content("cuda", (4, 4, 1, 1), slower), "gpu.json")]
    figure = tmp_path / "scaling.png"
    assert main(["--inputs", *files, "--figure", str(figure)]) == 0
    printed = capsys.readouterr().out
    of_cpu = cells(printed, "CPU: Some CPU, 2 threads, float32; growth")
    assert of_cpu["SDPA"] == ["-", "call", "2.00", "2.00", "1.00", "-"]
    assert of_cpu["sblocal"] == ["W 64, M 32", "call", "1.00", "1.00", "1.00", "from N = 4,096 on"]
    assert of_cpu["pairedcluster"] == ["C 57", "call", "0.90", "0.90", "1.00", "not up to N = 16,384"]
    of_gpu = cells(printed, "GPU: Some GPU, float32; growth")
    # 2 N and N ** 1.5 are equal at 4,096, where it is not yet faster
    assert of_gpu["SDPA"][:3] == ["-", "device", "1.50"]
    assert of_gpu["sblocal"][-1] == "from N = 16,384 on"
    assert cells(printed, "CPU: Some CPU, 2 threads, float32; forward")["sblocal"] == ["256", "0.5", "8.000", "1"]
    words = " ".join(printed.split())
    assert "fitted over N = 1,024, 4,096, 16,384" in words
    assert "batch 4 at N = 256, 4 at N = 1,024, 1 at N = 4,096" in words
    assert printed.count("sizes as at N = 4096, whatever N is") == 4
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_figure_has_a_row_for_each_file_and_the_lines_of_each(write):
    files = [write(content(), "cpu.json"), write(content("cuda"), "gpu.json")]
    figure = scaling.draw([scaling.read_scaling(path) for path in files])
    assert len(figure.axes) == 4
    for axes, quantity in zip(figure.axes, [*scaling.QUANTITIES] * 2, strict=True):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        drawn = {line.get_label(): line for line in axes.lines}
        assert set(LAWS) <= set(drawn)
        assert list(drawn["sblocal"].get_xdata()) == list(LENGTHS)
        if quantity == "milliseconds":
            assert list(drawn["sblocal"].get_ydata()) == pytest.approx([0.5, 2, 8, 32])
        slopes = []
        for line in axes.lines:
            if line.get_label() not in LAWS:
                (x0, x1), (y0, y1) = line.get_data()
                slopes.append(scaling.math.log(y1 / y0) / scaling.math.log(x1 / x0))
        assert slopes == pytest.approx([1, 2])


def test_of_the_attentions_those_that_are_asked_for(write, capsys):
    assert main(["--inputs", write(content()), "--attentions", "sblocal,reformer"]) == 0
    assert list(cells(capsys.readouterr().out, "growth with N")) == ["SDPA", "sblocal"]


def test_reads_what_the_benchmark_writes(tmp_path, capsys):
    output = tmp_path / "times.json"
    options = ["--device", "cpu", "--threads", "1", "--dim", "16", "--batch", "2", "--no-baselines", "--repeats", "1"]
    options += ["--lengths", "64,128", "--passes", "forward", "--attentions", "full,local,pairedcluster"]
    assert benchmark.main([*options, "--growth-length", "128", "--output", str(output)]) == 0
    names = ("full", "local", "pairedcluster")
    found = scaling.read_scaling(output, names)
    assert [line.name for line in found.lines] == ["SDPA", *names]
    results = json.loads(output.read_text())["results"]
    for line in found.lines:
        for point in line.points:
            label = line.name if point.length == 128 or not line.sizes else f"{line.name} as at 128"
            (row,) = (row for row in results if (row["name"], row["length"]) == (label, point.length))
            assert (point.milliseconds, point.ratio) == (row["milliseconds"] / 2, row["ratio_to_sdpa"])
            assert point.mebibytes == row["temporary_bytes"] / 2**21
            assert line.sizes == row["sizes"]


def without(value, *names):
    return {name: each for name, each in value.items() if name not in names}


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (None, [], "times.json does not exist. Give --inputs what benchmark_attention.py has written by --output."),
        ("{", [], "times.json is damaged"),
        ("[]", [], "not a JSON object"),
        ({"results": []}, [], "times.json is not a file of benchmark_attention.py. Give --inputs"),
        (without(content(), "machine"), [], "is not a file of benchmark_attention.py"),
        ({**content(), "results": [{"name": "a"}]}, [], "is not a file of benchmark_attention.py"),
        ({**content(), "results": []}, [], "has no forward pass of SDPA and one of sblocal, pairedcluster"),
        (content(), ["--attentions", "smyrf"], "times.json has no forward pass of SDPA and one of smyrf"),
        (content(), ["--attentions", "sblocl"], "'sblocl' is unknown. Did you mean 'sblocal'"),
        (content(), ["--fit-from", "0"], "--fit-from: '0' is not an integer of at least 1"),
        (content(), ["--figure", "scaling.doc"], "--figure: scaling.doc: the name has to end in .png"),
    ],
)
def test_mistakes_are_one_line(write, tmp_path, capsys, value, options, message):
    path = str(tmp_path / "times.json") if value is None else write(value)
    assert main(["--inputs", path, *options]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    assert line.startswith("Error: ")
    assert message in line
