"""The benchmark of whole networks: that all implementations compute the same, what is reported, and failures."""

from __future__ import annotations

import dataclasses
import json
import signal
import statistics

import pytest
import torch

from scatterbrain.attention import ATTENTIONS
from scripts import benchmark_model as benchmark
from src.analysis.benchmark import model, networks
from src.analysis.benchmark.model import ModelBench
from src.analysis.benchmark.networks import Implementation
from src.models.t2t_vit import T2T_VIT_VARIANTS
from tests.helpers import assert_close

SMALL = ["--variant", "t2t_vit_t_7", "--device", "cpu", "--image-size", "32", "--num-classes", "5", "--threads", "1"]
QUICK = ["--batches", "2,3", "--repeats", "3", "--implementations", "published,module,inference"]


@pytest.fixture(autouse=True, scope="module")
def shallow():
    """One backbone block in place of 7, a small baseline, and short evaluations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(T2T_VIT_VARIANTS, "t2t_vit_t_7", dataclasses.replace(T2T_VIT_VARIANTS["t2t_vit_t_7"], depth=1))
        patch.setattr(networks, "BASELINE", "test_vit")
        patch.setattr(model, "EVALUATION_SECONDS", 0.2)
        yield


def parse(*options):
    return benchmark.build_parser().parse_args([*SMALL, *options])


def run(folder, *options):
    """The JSON file of a run."""
    output = folder / "model.json"
    assert benchmark.main([*SMALL, *QUICK, *options, "--output", str(output)]) == 0
    return json.loads(output.read_text(encoding="utf-8"))


def images(number=2):
    return torch.randn(number, 3, 32, 32)


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    options = ["--attentions", "full,sblocal", "--implementations", "published,module,inference,baseline"]
    return run(folder, *options, "--end-to-end", "--figure", str(folder / "model.png")), folder


@torch.inference_mode()
def test_the_published_implementation_computes_the_same():
    arguments = model.with_defaults(parse(), torch.device("cpu"))
    published, module = (
        networks.build(Implementation(kind, attention), arguments, torch.device("cpu"))
        for kind, attention in (("published", None), ("module", "full"))
    )
    batch = images()
    assert_close("logits", module(batch), published(batch), 1e-5)
    # the scale of a token stage follows from its input's width, not from that of its head
    stages = (published.patch_embed.attention1, published.patch_embed.attention2)
    assert [stage.attn.attention.scale for stage in stages] == [147**-0.5, 576**-0.5]
    kinds = {type(block.attn) for block in published.blocks}
    assert kinds == {networks.PublishedSelfAttention}


@torch.inference_mode()
@pytest.mark.parametrize("attention", sorted(ATTENTIONS))
def test_the_inference_form_is_of_the_same_network(attention):
    arguments = model.with_defaults(parse(), torch.device("cpu"))
    inference, module = (
        networks.build(Implementation(kind, attention), arguments, torch.device("cpu"))
        for kind in ("inference", "module")
    )
    batch = images()
    assert_close("logits", module(batch), inference(batch), 1e-5)


@pytest.mark.parametrize(
    ("precision", "dtype", "result"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("16-true", torch.float16, torch.float16),
        ("bf16-mixed", torch.float32, torch.bfloat16),
    ],
)
@torch.inference_mode()
def test_precision(precision, dtype, result):
    bench = ModelBench(parse("--precision", precision, "--implementations", "module", "--attentions", "local"))
    batch = bench.implementations[0].images(2, bench.arguments, bench.device)
    assert batch.dtype == dtype
    assert networks.build(bench.implementations[0], bench.arguments, bench.device)(batch).dtype == result


def test_what_is_reported(content):
    content, _ = content
    names = ["published", "module full", "module sblocal", "inference full", "inference sblocal", "timm test_vit"]
    assert [row["name"] for row in content["results"]] == 2 * names
    assert [row["batch"] for row in content["results"]] == 6 * [2] + 6 * [3]
    assert content["skipped"] == []
    for batch in (2, 3):
        rows = {row["name"]: row for row in content["results"] if row["batch"] == batch}
        for row in rows.values():
            rounds = row["milliseconds_per_round"]
            assert len(rounds) == 3
            assert min(rounds) > 0
            assert row["milliseconds"] == statistics.median(rounds)
            assert row["images_per_second"] == pytest.approx(1e3 * batch / row["milliseconds"])
            ratios = [x / y for x, y in zip(rows["published"]["milliseconds_per_round"], rounds, strict=True)]
            assert row["speed_over_published"] == pytest.approx(statistics.median(ratios))
            assert row["peak_memory_mib"] is None
            assert row["first_call_seconds"] > 0
        assert rows["published"]["speed_over_published"] == 1
    for name, batch in content["best_batch"].items():
        rates = {row["batch"]: row["images_per_second"] for row in content["results"] if row["name"] == name}
        assert rates[batch] == max(rates.values())
    assert content["complete"] is True
    assert content["settings"]["batches"] == [2, 3]
    assert not {"output", "figure"} & set(content["settings"]), "paths of this machine are no part of the results"
    assert content["machine"]["threads"] == 1


def test_whole_evaluations(content):
    content, _ = content
    assert [row["attention"] for row in content["end_to_end"]] == ["full", "sblocal"]
    for row in content["end_to_end"]:
        assert row["implementation_alone"] == f"inference {row['attention']}"
        assert row["batch"] == content["best_batch"][row["implementation_alone"]]
        assert row["num_images"] % row["batch"] == 0
        assert row["ratio_to_alone"] == pytest.approx(row["images_per_second"] / row["images_per_second_alone"])
        assert row["ratio_to_alone"] > 0


def test_the_figure_has_a_bar_for_each_form(content):
    assert (content[1] / "model.png").read_bytes().startswith(b"\x89PNG")
    bench = ModelBench(parse(*QUICK, "--attentions", "local"))
    bench.results = [
        {"name": each.name, "kind": each.kind, "batch": 2, "images_per_second": 100.0 + number}
        for number, each in enumerate(bench.implementations)
    ]
    axis = bench.draw().axes[0]
    assert [bar.get_width() for bar in axis.patches] == [100, 101, 102]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["published", "module local", "inference local"]


def test_printed(capsys):
    options = ["--batches", "2", "--repeats", "1", "--implementations", "published,module", "--attentions", "performer"]
    assert benchmark.main([*SMALL, *options]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("t2t_vit_t_7", "published", "module performer", "images/s", "torch"))


@pytest.mark.parametrize(
    ("device", "options", "names"),
    [
        ("cpu", [], ["published", "module local", "inference local", "timm test_vit"]),
        ("cpu", ["--implementations", "published,module,inference"], ["published", "module local", "inference local"]),
        (
            "cpu",
            ["--compile", "--implementations", "published,inference"],
            ["published", "published, compiled", "inference local", "inference local, compiled"],
        ),
        ("cuda", [], ["published", "module local", "inference local, CUDA graph", "timm test_vit"]),
        (
            "cuda",
            ["--compile"],
            [
                *("published", "published, compiled", "published, compiled, CUDA graph"),
                *("module local", "module local, compiled, CUDA graph"),
                *("inference local, CUDA graph", "inference local, compiled, CUDA graph"),
                *("timm test_vit", "timm test_vit, compiled, CUDA graph"),
            ],
        ),
    ],
)
def test_implementations(device, options, names):
    device = torch.device(device)
    arguments = model.with_defaults(parse("--attentions", "local", *options), device)
    assert [each.name for each in networks.choose(arguments, device)] == names


@torch.inference_mode()
def test_compiled_implementations_run_through_the_compiler(monkeypatch):
    compile_function, calls = torch.compile, []

    def compile_without_compiler(function, **options):
        calls.append(options)
        return compile_function(function, **options, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_without_compiler)
    arguments = model.with_defaults(parse(), torch.device("cpu"))
    batch = images()
    for kind, attention in (("published", None), ("inference", "sblocal")):
        eager, compiled = (
            networks.build(Implementation(kind, attention, compiled=x), arguments, torch.device("cpu"))
            for x in (False, True)
        )
        assert_close(kind, eager(batch), compiled(batch), 1e-5)
    assert calls == 2 * [{"dynamic": False}]


def fail(monkeypatch, name, error, at=1):
    """Let calls of an implementation fail from the given one on."""
    genuine, calls = model.build, []

    def build(implementation, arguments, device):
        forward = genuine(implementation, arguments, device)

        def call(images):
            calls.append(implementation.name)
            if implementation.name == name and calls.count(name) >= at:
                raise error
            return forward(images)

        return call

    monkeypatch.setattr(model, "build", build)


@pytest.mark.parametrize(
    ("name", "at", "error", "reason"),
    [
        ("published", 1, torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
        ("published", 3, RuntimeError("no kernel.\nC++ stack"), "RuntimeError: no kernel"),
        ("inference local", 1, TypeError("a compiler's"), "TypeError: a compiler's"),
        ("inference local", 3, torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
    ],
)
def test_an_implementation_that_fails_is_listed(name, at, error, reason, monkeypatch, capsys, tmp_path):
    fail(monkeypatch, name, error, at)
    content = run(tmp_path, "--attentions", "local", "--batches", "2")
    assert content["skipped"] == [{"name": name, "batch": 2, "reason": reason}]
    assert [row["name"] for row in content["results"]] == [
        other for other in ("published", "module local", "inference local") if other != name
    ]
    for row in content["results"]:
        assert (row["speed_over_published"] is None) == (name == "published")
    assert f"{name} left out at batch 2: {reason}." in capsys.readouterr().out


def test_a_reason_is_reported_once_for_all_batches(monkeypatch, capsys):
    fail(monkeypatch, "module local", RuntimeError("no kernel"))
    options = ["--batches", "2,3", "--repeats", "1", "--implementations", "published,module", "--attentions", "local"]
    assert benchmark.main([*SMALL, *options]) == 0
    assert "module local left out at batch 2, 3: RuntimeError: no kernel." in capsys.readouterr().out


def test_nothing_that_could_be_measured(monkeypatch, capsys):
    fail(monkeypatch, "published", RuntimeError("no kernel"))
    assert benchmark.main([*SMALL, "--implementations", "published", "--batches", "2"]) == 1
    error = "Error: Nothing could be measured. published at batch 2: RuntimeError: no kernel.\n"
    assert capsys.readouterr().err.endswith(error)


def test_an_evaluation_that_fails_is_listed(monkeypatch, tmp_path):
    def evaluate(config):
        raise RuntimeError("a bug")

    monkeypatch.setattr("src.tasks.evaluate.evaluate", evaluate)
    content = run(tmp_path, "--implementations", "module", "--attentions", "local", "--batches", "2", "--end-to-end")
    assert content["skipped"] == [{"name": "evaluation local", "batch": 2, "reason": "RuntimeError: a bug"}]


INTERRUPTIBLE = [*SMALL, "--implementations", "published,module", "--attentions", "local,sblocal", "--repeats", "2"]
INTERRUPTIBLE += ["--batches", "2,3", "--end-to-end"]


def stop_at(monkeypatch, batch, number):
    """Send a signal in the last round of a batch."""
    genuine, calls = model.seconds_per_call, []

    def seconds_per_call(*arguments):
        calls.append(arguments)
        if len(calls) == 3 * 2 * (1 if batch == 2 else 2):
            signal.raise_signal(number)
        return genuine(*arguments)

    monkeypatch.setattr(model, "seconds_per_call", seconds_per_call)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_batches_that_are_complete_outlive_a_signal(number, monkeypatch, tmp_path, capsys):
    stop_at(monkeypatch, 3, number)
    genuine = ModelBench.draw

    def draw(*arguments):
        signal.raise_signal(number)  # they often come twice
        return genuine(*arguments)

    monkeypatch.setattr(ModelBench, "draw", draw)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    output, figure = tmp_path / "model.json", tmp_path / "model.png"
    assert benchmark.main([*INTERRUPTIBLE, "--output", str(output), "--figure", str(figure)]) == 1
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == ("Interrupted. Missing: batch 3, evaluation local, evaluation sblocal.")
    assert "module sblocal" in captured.out
    content = json.loads(output.read_text(encoding="utf-8"))
    assert content["complete"] is False
    names = ["published", "module local", "module sblocal"]
    assert [(row["name"], row["batch"]) for row in content["results"]] == [(name, 2) for name in names]
    assert all(len(row["milliseconds_per_round"]) == 2 for row in content["results"])
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_evaluations_that_are_complete_outlive_a_signal(monkeypatch, tmp_path, capsys):
    output, contents = tmp_path / "model.json", []

    def evaluate(bench, alone, *_):
        contents.append(json.loads(output.read_text(encoding="utf-8")))
        if alone["attention"] == "sblocal":
            signal.raise_signal(signal.SIGTERM)
        numbers = ("num_images", "images_per_second", "images_per_second_alone", "ratio_to_alone")
        return {
            "attention": alone["attention"],
            "batch": 2,
            "peak_memory_mib": None,
            **dict.fromkeys(numbers, 1),
        }

    monkeypatch.setattr(ModelBench, "evaluate", evaluate)
    assert benchmark.main([*INTERRUPTIBLE, "--output", str(output)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "Interrupted. Missing: evaluation sblocal."
    # what would be left if the process had been killed in the first, in the second, and at the end
    contents.append(json.loads(output.read_text(encoding="utf-8")))
    assert [len(content["results"]) for content in contents] == [6, 6, 6]
    assert [[row["attention"] for row in content["end_to_end"]] for content in contents] == [[], ["local"], ["local"]]
    assert not any(content["complete"] for content in contents)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_written_where_nothing_is_complete(number, monkeypatch, tmp_path, capsys):
    stop_at(monkeypatch, 2, number)
    files = ["--output", str(tmp_path / "model.json"), "--figure", str(tmp_path / "model.png")]
    assert benchmark.main([*INTERRUPTIBLE, *files]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "Interrupted. Nothing was written."
    assert not captured.out
    assert not list(tmp_path.iterdir())


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "last"), [("module", False), ("inference", True)])
def test_images_are_laid_out_as_evaluations_have_them(kind, last):
    bench = ModelBench(parse("--implementations", kind, "--attentions", "local"))
    found = bench.implementations[0].images(3, bench.arguments, bench.device)
    assert found.shape == (3, 3, 32, 32)
    assert found.is_contiguous(memory_format=torch.channels_last) is last


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"eval.compile": False, "model.t2tattn1_cfg.memory_fraction": 1 / 32}),
        (["--memory-fraction", "1/4"], {"model.t2tattn2_cfg.memory_fraction": 1 / 4}),
        (["--precision", "bf16-true"], {"trainer.precision": "bf16-true"}),
    ],
)
def test_the_evaluation_has_the_options_of_the_benchmark(options, expected, tmp_path):
    bench = ModelBench(parse(*options, "--implementations", "module", "--attentions", "sblocal"))
    alone = {"name": "module sblocal, compiled", "attention": "sblocal", "batch": 6}
    config = bench.compose(alone | {"name": "module sblocal"}, 60, tmp_path / "a b.pth", tmp_path)
    for name, value in expected.items():
        node = config
        for part in name.split("."):
            node = node[part]
        assert node == value, name
    assert (config.datamodule.batch_size, config.datamodule.num_images, config.datamodule.image_size) == (6, 60, 32)
    assert config.eval.ckpt == str(tmp_path / "a b.pth")
    assert bench.compose(alone, 60, tmp_path / "c", tmp_path).eval.compile is True


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--variant", "t2t_vit_t_77"], ["t2t_vit_t_77", "t2t_vit_t_7"]),
        (["--variant", "t2t_vit_7"], ["t2t_vit_7", "cannot be swapped", "t2t_vit_t_14"]),
        (["--attentions", "full,sblocl"], ["sblocl", "sblocal"]),
        (["--implementations", "publishd"], ["publishd", "published"]),
        (["--implementations", "peer"], ["--implementations", "'peer'", "baseline"]),
        (["--no-peers"], ["--no-peers", "--help"]),
        (["--batches", "2,0"], ["--batches", "'0'"]),
        (["--image-size", "33"], ["image_size=33", "16"]),
        (["--num-classes", "-1"], ["--num-classes", "'-1'"]),
        (["--repeats", "x"], ["--repeats", "'x'"]),
        (["--memory-fraction", "2"], ["memory_fraction=2.0"]),
        (["--precision", "8"], ["--precision", "'8'", "bf16-true"]),
        (["--device", "gpu"], ["--device", "'gpu'", "cuda"]),
        (["--output", "no/such/folder/model.json"], ["no/such/folder/model.json"]),
        (["--figure", "model.doc"], ["--figure", "model.doc", ".png"]),
    ],
)
def test_wrong_options(options, words, capsys):
    assert benchmark.main([*SMALL, *options]) == 1
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("Error: ")
    assert captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err


@pytest.mark.gpu
def test_on_cuda(tmp_path):
    options = ["--device", "cuda", "--image-size", "224", "--batches", "8,16", "--attentions", "full,sblocal"]
    content = run(tmp_path, *options, "--implementations", "published,module,inference,baseline", "--end-to-end")
    assert content["skipped"] == []
    memory = {(row["name"], row["batch"]): row["peak_memory_mib"] for row in content["results"]}
    assert memory["published", 16] > memory["published", 8] > memory["module full", 8]
    alone = run(tmp_path, *options, "--implementations", "inference", "--attentions", "sblocal")
    for row in alone["results"]:
        assert memory[row["name"], row["batch"]] == pytest.approx(row["peak_memory_mib"], rel=0.1)
    assert all(row["peak_memory_mib"] > 0 for row in content["end_to_end"])
