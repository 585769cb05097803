"""The experiment over memory: its figures against dense computations of the test's own, and the script end to end."""

from __future__ import annotations

import json
import signal
import statistics
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from scatterbrain.attention import ATTENTIONS
from scatterbrain.errors import UserError
from scripts.experiment_memory import main
from src.analysis.approximation import load_model
from src.analysis.experiments import memory
from src.models.attention_inputs import capture_stage_inputs
from src.models.t2t_vit import create_t2t_vit
from tests.src.tasks.setup import IMAGE_SIZE, NUM_CLASSES, make_checkpoint, make_images

NUM_IMAGES = 12
SEED = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs in `val`, and a checkpoint."""
    folder = make_images(tmp_path_factory.mktemp("memory"), NUM_IMAGES)
    make_checkpoint(folder / "t7.pth", "t2t_vit_t_7")
    return folder


@pytest.fixture(scope="module")
def photographs(folder):
    """Images and labels, not by the loader under test."""
    dataset = memory.open_split(folder, "val", SimpleNamespace(image_size=IMAGE_SIZE, num_classes=NUM_CLASSES))
    return torch.stack([dataset[number][0] for number in range(NUM_IMAGES)]), torch.tensor(dataset.targets)


@pytest.fixture(scope="module")
def model(folder, photographs):
    """Of random weights, and a bias that gives every class its share of the photographs."""
    model = load_model(folder / "t7.pth")[1]
    with torch.no_grad():
        model.head.bias -= model(photographs[0]).mean(0)
    return model


@pytest.fixture(scope="module")
def reference(model, photographs):
    return memory.Reference.of(model, *photographs, error_images=5, batch_size=4)


def first_predictions(model, images, name, memory_fraction, seed):
    """Of a network that is built with the attention, in its ordinary form."""
    stage = {"name": name} if name == "full" else {"name": name, "memory_fraction": memory_fraction}
    other = create_t2t_vit("t2t_vit_t_7", [stage, stage], IMAGE_SIZE, NUM_CLASSES, seed=seed).eval()
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all(name.endswith("projection_matrix") for name in missing)
    with torch.no_grad():
        return other(images).argmax(1), other.token_attentions


def dense_error(attention, inputs):
    """Mean over images of the relative error of the output, in float64 from the dense weights."""
    query, key, value = (x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
    weights = attention(inputs.query, inputs.key, inputs.value, need_weights=True)[1].double()
    full = (inputs.scale * query.double() @ key.double().transpose(-2, -1)).softmax(-1)
    out, expected = (x @ value.double() for x in (weights, full))
    return torch.stack([(a - b).norm() / b.norm() for a, b in zip(out, expected, strict=True)]).mean().item()


# Parts ----------------------------------------------------------------------------------------------------------------


def test_every_attention_with_a_budget_is_measured():
    assert set(ATTENTIONS) - set(memory.BUDGETED) == {"full", "zero", "uniform"}
    assert set(memory.STRONG) <= set(memory.BUDGETED)


def test_photographs_are_those_asked_for(folder, photographs, model):
    dataset = memory.open_split(folder, "val", model)
    images, labels = memory.load_photographs(dataset, [7, 2])
    assert torch.equal(images, photographs[0][[7, 2]])
    assert labels.tolist() == photographs[1][[7, 2]].tolist()
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_reference_is_full_attention(reference, model, photographs):
    images, labels = photographs
    expected = first_predictions(model, images, "full", None, 0)[0]
    assert reference.predictions.tolist() == expected.tolist()
    assert len(set(expected.tolist())) == NUM_CLASSES, "else agreement would tell nothing"
    assert reference.top1 == pytest.approx(100 * (expected == labels).double().mean().item())
    # 5 of 12, spread evenly, in batches of 4
    assert [len(pair[1].query) for pair in reference.stages] == [4, 1]
    assert sum(len(pair[0].query) for pair in reference.stages) == 5
    query = capture_stage_inputs(model, images[[1, 3, 6, 8, 10]])[1].query
    # float32 sums in batches of other sizes
    torch.testing.assert_close(torch.cat([pair[1].query for pair in reference.stages]), query, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["local", "performer", "sbsmyrf", "bs-longformer"])
def test_figures_are_those_of_networks_built_with_the_attention(name, reference, model, photographs):
    images, labels = photographs
    seeds = [SEED, SEED + 1] if name in ("performer", "sbsmyrf") else [SEED]
    logged = []
    row = memory.measure_point(reference, name, 1 / 4, seeds, logged.append)
    full = first_predictions(model, images, "full", None, 0)[0]
    stages = capture_stage_inputs(model, images[[1, 3, 6, 8, 10]])
    expected = {"top1": [], "agreement": [], "errors": ([], [])}
    for seed in seeds:
        predictions, attentions = first_predictions(model, images, name, 1 / 4, seed)
        expected["top1"].append(100 * (predictions == labels).sum().item() / NUM_IMAGES)
        expected["agreement"].append(100 * (predictions == full).sum().item() / NUM_IMAGES)
        for errors, attention, inputs in zip(expected["errors"], attentions, stages, strict=True):
            errors.append(dense_error(attention, inputs))
    for kind in ("top1", "agreement"):
        assert row[kind]["per_seed"] == pytest.approx(expected[kind])
        assert 0 < row[kind]["mean"] < 100, "all or nothing would show no mistake"
    for stage, errors in zip(row["stages"], expected["errors"], strict=True):
        # float32 against float64; where blocks cover everything, there is nothing but rounding
        assert stage["output_error"]["per_seed"] == pytest.approx(errors, rel=1e-4, abs=1e-6)
    values = [row["top1"], row["agreement"], *(stage["output_error"] for stage in row["stages"])]
    for value in values:
        assert value["mean"] == pytest.approx(statistics.fmean(value["per_seed"]))
        std = statistics.stdev(value["per_seed"]) if len(seeds) > 1 else None
        assert value["std"] == (std if std is None else pytest.approx(std))
    assert row["seeds"] == seeds
    assert logged == [f"{name} 1/4, seed {number + 1} of {len(seeds)}" for number in range(len(seeds))]


@pytest.mark.parametrize("name", ["local", "bs-longformer"])
def test_memory_is_that_of_the_pairs_there_are(name, reference):
    row = memory.measure_point(reference, name, 1 / 4, [SEED])
    pairs = []
    for stage, inputs in enumerate(reference.stages[0]):
        module = memory.create_stage_attentions(name, reference.model, 1 / 4, SEED)[stage]
        weights = module(inputs.query, inputs.key, inputs.value, need_weights=True)[1]
        # a window is cut off at both ends of the sequence, which its memory does not count
        each = (weights[0, 0] > 0).sum(-1).double()
        pairs.append((each.max() if name == "local" else each.mean()).item())
    assert [stage["memory"] for stage in row["stages"]] == pytest.approx([pairs[0] / 64, pairs[1] / 16])
    assert row["memory"] == pytest.approx((64 * pairs[0] + 16 * pairs[1]) / (64**2 + 16**2))
    # blocks cannot be smaller than 16 tokens
    assert (row["memory"] > 1 / 4) == (name == "bs-longformer")


def test_memory_counts_two_columns_for_a_feature(reference):
    row = memory.measure_point(reference, "performer", 1 / 8, [SEED])
    # 64 / 8 and 16 / 8 columns
    assert [stage["sizes"]["nb_features"] for stage in row["stages"]] == [4, 1]
    assert [stage["memory"] for stage in row["stages"]] == [8 / 64, 2 / 16]
    assert row["memory"] == 1 / 8


def test_the_model_keeps_full_attention(model, reference, monkeypatch):
    own = model.token_attentions
    memory.measure_point(reference, "local", 1 / 4, [SEED])
    assert model.token_attentions == own
    monkeypatch.setattr(memory, "predict", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        memory.measure_point(reference, "local", 1 / 4, [SEED])
    assert model.token_attentions == own


def test_configurations_come_in_order_and_only_what_is_random_is_drawn_again(reference):
    rows = list(memory.measure_memory(reference, ("local", "performer"), (1 / 16, 1 / 4), num_seeds=2, seed=SEED))
    assert [(row["attention"], row["memory_fraction"]) for row in rows] == [
        (name, fraction) for name in ("local", "performer") for fraction in (1 / 16, 1 / 4)
    ]
    assert [row["seeds"] for row in rows] == [[SEED]] * 2 + [[SEED, SEED + 1]] * 2
    # another draw is another error
    assert rows[3]["stages"][0]["output_error"]["std"] > 0


def test_what_cannot_be_is_left_out_with_its_reason(reference, monkeypatch):
    genuine = memory.create_stage_attentions

    def create(name, model, memory_fraction, seed):
        if name == "cluster" and memory_fraction < 1 / 4:
            raise UserError("the budget is too small.")
        if name == "smyrf":
            raise torch.OutOfMemoryError("much\nmore")
        if name == "reformer":
            raise RuntimeError("no kernel\nand more")
        modules = genuine(name, model, memory_fraction, seed)
        if name == "performer":
            modules[1].projection_matrix.fill_(torch.nan)
        return modules

    monkeypatch.setattr(memory, "create_stage_attentions", create)
    names = ("cluster", "smyrf", "reformer", "performer", "bs-openai", "local")
    rows = list(memory.measure_memory(reference, names, (1 / 16, 1 / 4), num_seeds=1, seed=SEED))
    reasons = [row.get("reason") for row in rows]
    assert reasons == [
        *("the budget is too small", None),
        *["out of memory"] * 2,
        *["RuntimeError: no kernel"] * 2,
        *[f"The output of seed {SEED} is not finite"] * 2,
        # blocks of 16 tokens are the smallest
        *(None, "its sizes are those of the budget 1/16"),
        *(None, None),
    ]
    assert list(memory.skipped_lines(rows)) == [
        "cluster left out at 1/16: the budget is too small.",
        "smyrf left out at 1/16, 1/4: out of memory.",
        "reformer left out at 1/16, 1/4: RuntimeError: no kernel.",
        f"performer left out at 1/16, 1/4: The output of seed {SEED} is not finite.",
        "bs-openai left out at 1/4: its sizes are those of the budget 1/16.",
    ]
    # neither table nor figure trips over them
    assert memory.memory_table(rows, 90.0).row_count == 4
    memory.draw(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"memory_fractions": (1 / 4, 2)}, "memory_fraction=2 has to lie in"), ({"seed": -1}, "seed=-1 is not valid")],
)
def test_values_out_of_range_are_refused_before_anything_is_measured(reference, options, message, monkeypatch):
    monkeypatch.setattr(memory, "measure_point", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=message):
        list(memory.measure_memory(reference, **options))


def test_fractions_are_written_as_they_are_given():
    assert [memory.fraction_text(value) for value in (1 / 32, 0.1, 1, 0.123456)] == ["1/32", "1/10", "1", "0.123"]


def test_figure_has_a_curve_for_each_attention_and_a_band_where_there_is_std():
    def row(name, at, std):
        value = {"mean": 50.0, "std": std, "per_seed": [50.0]}
        stages = [{"memory": (1 + stage) * at, "output_error": {**value, "mean": 0.5}} for stage in (0, 1)]
        return {"attention": name, "memory": at, "agreement": value, "stages": stages}

    # out of order, as block-sparse attentions can be
    rows = [row("bs-openai", 0.4, None), row("bs-openai", 0.3, None), row("sblocal", 0.1, 60.0)]
    panels = memory.draw([*rows, {"attention": "local", "memory_fraction": 0.1, "reason": "x"}]).axes
    assert len(panels) == 3
    for panel, times in zip(panels, (1, 1, 2), strict=True):
        lines = {line.get_label(): line.get_xdata() for line in panel.get_lines()}
        assert list(lines["bs-openai"]) == pytest.approx([0.3 * times, 0.4 * times])
        assert list(lines["sblocal"]) == pytest.approx([0.1 * times])
        assert "local" not in lines
        (band,) = panel.collections
        low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
        # a mean of 50 ± 60 in percent, and of 0.5 ± 60 on an axis without zero
        assert (low, high) == pytest.approx((5, 100) if panel is panels[0] else (0.05, 60.5))


# End to end -----------------------------------------------------------------------------------------------------------


def options(folder, *more):
    given = [f"--checkpoint={folder}/t7.pth", f"--data-dir={folder}", "--attentions=local,performer,bs-openai"]
    given += ["--memory-fractions=1/4,0.0625", "--num-seeds=2", f"--seed={SEED}", "--batch-size=4", "--device=cpu"]
    return [*given, "--error-images=3", "--threads=1", *more]


def test_end_to_end(folder, tmp_path, capsys):
    output, figure = tmp_path / "m.json", tmp_path / "m.png"
    assert main(options(folder, "--limit=6", f"--output={output}", f"--figure={figure}")) == 0
    out = capsys.readouterr().out
    assert "performer │   1/16" in out
    assert "bs-openai left out at 1/4: its sizes are those of the budget 1/16." in out
    with Image.open(figure) as image:
        assert image.format == "PNG"
    content = memory.read_results(output)
    assert content["complete"] is True
    assert content["model"] == "t2t_vit_t_7"
    assert (content["num_images"], content["num_error_images"]) == (6, 3)
    assert content["settings"]["memory_fractions"] == [1 / 16, 1 / 4]
    assert str(folder) not in output.read_text()
    cases = [("local", 1 / 16), ("local", 1 / 4), ("performer", 1 / 16), ("performer", 1 / 4), ("bs-openai", 1 / 16)]
    assert [(row["attention"], row["memory_fraction"]) for row in content["results"]] == cases
    assert [(row["attention"], row["memory_fraction"]) for row in content["skipped"]] == [("bs-openai", 1 / 4)]
    # the same as the parts give
    _, model = load_model(folder / "t7.pth")
    dataset = memory.open_split(folder, "val", model)
    images, labels = memory.load_photographs(dataset, [1, 3, 5, 7, 9, 11])
    reference = memory.Reference.of(model, images, labels, error_images=3, batch_size=4)
    assert content["full_attention"]["top1"] == reference.top1
    rows = memory.measure_memory(reference, ("local", "performer", "bs-openai"), (1 / 16, 1 / 4), 2, SEED)
    rows = [row for row in rows if "reason" not in row]
    assert json.loads(json.dumps(rows)) == content["results"]


def stop_in(monkeypatch, name, number):
    """Send a signal in the second budget of an attention."""
    genuine = memory.measure_point

    def measure_point(reference, attention, memory_fraction, *more):
        if (attention, memory_fraction) == (name, 1 / 4):
            signal.raise_signal(number)
        return genuine(reference, attention, memory_fraction, *more)

    monkeypatch.setattr(memory, "measure_point", measure_point)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_complete_outlives_a_signal(number, folder, monkeypatch, tmp_path, capsys):
    output, figure = tmp_path / "m.json", tmp_path / "m.png"
    stop_in(monkeypatch, "performer", number)
    genuine, contents = memory.draw, []

    def draw(rows):
        contents.append(memory.read_results(output))
        signal.raise_signal(number)  # they often come twice
        return genuine(rows)

    monkeypatch.setattr(memory, "draw", draw)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert main(options(folder, f"--output={output}", f"--figure={figure}")) == 1
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "Interrupted. Missing: performer 1/4, bs-openai 1/16, bs-openai 1/4."
    assert "performer" in captured.out
    assert contents[0]["complete"] is False
    assert [row["attention"] for row in contents[0]["results"]] == ["local", "local", "performer"]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_output_is_written_attention_by_attention(folder, monkeypatch, tmp_path):
    output, contents = tmp_path / "m.json", []
    genuine = memory.measure_point

    def measure_point(reference, attention, memory_fraction, *more):
        contents.append(memory.read_results(output) if output.exists() else None)
        return genuine(reference, attention, memory_fraction, *more)

    monkeypatch.setattr(memory, "measure_point", measure_point)
    assert main(options(folder, f"--output={output}", "--limit=2")) == 0
    # as it would be left if the process were killed
    assert [content and len(content["results"]) for content in contents] == [None, None, 2, 2, 4]
    assert not any(content["complete"] for content in contents if content)


@pytest.mark.parametrize("name", ["local", None])
def test_nothing_is_written_where_nothing_is_complete(name, folder, monkeypatch, tmp_path, capsys):
    def stop(*_):
        signal.raise_signal(signal.SIGTERM)

    # in the first attention, or before it
    monkeypatch.setattr(memory, "measure_point" if name else "load_photographs", stop)
    assert main(options(folder, f"--output={tmp_path}/m.json")) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "Interrupted. Nothing was written."
    assert not list(tmp_path.iterdir())


def refuses(capsys, given, message, began=False):
    """The tool says what is wrong in one line, behind the progress display where it began, and ends with status 1."""
    assert main(given) == 1
    captured = capsys.readouterr()
    *before, line = captured.err.splitlines()
    assert not before or (began and not any("Error" in each for each in before))
    assert captured.out == ""
    assert line.startswith("Error: ")
    assert message in line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--checkpoint={folder}/none.pth"], "none.pth"),
        (["--split=none"], "none is not a folder"),
        (["--attentions=local,full"], "'full' is unknown"),
        (["--memory-fractions=1/4,2"], "memory_fraction=2.0 has to lie in (0, 1]"),
        (["--memory-fractions=0"], "'0' is not a positive number"),
        (["--memory-fractions=1/x"], "'1/x' is not a number or a fraction"),
        (["--seed=-1"], "--seed=-1 is not valid"),
        (["--num-seeds=0"], "'0' is not an integer of at least 1"),
        (["--figure={folder}/f.jpg"], "the name has to end in .png, .pdf or .svg."),
        (["--output={folder}/none/m.json"], "has to be a file in a folder that exists"),
        (["--precision=16"], "--help lists the options"),
    ],
)
def test_refuses(folder, capsys, more, message):
    refuses(capsys, options(folder, *(option.format(folder=folder) for option in more)), message)


def test_a_photograph_that_cannot_be_decoded_is_named(tmp_path, folder, capsys):
    make_images(tmp_path, 5)
    (tmp_path / "val" / "c2" / "002.png").write_bytes(b"none")
    refuses(capsys, options(folder, f"--data-dir={tmp_path}"), "c2/002.png", began=True)


def test_all_left_out_is_an_error(folder, monkeypatch, capsys):
    def measure_point(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(memory, "measure_point", measure_point)
    message = "Nothing could be measured. local left out at 1/16, 1/4: RuntimeError: broken."
    refuses(capsys, options(folder), message, began=True)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"results": []}'])
def test_only_results_are_read(tmp_path, content):
    if content is not None:
        (tmp_path / "m.json").write_text(content)
    with pytest.raises(UserError, match=r"m\.json .*Give the --output of a run"):
        memory.read_results(tmp_path / "m.json")
