import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from scatterbrain.errors import UserError
from src.evaluation.predictions import PREDICTIONS_FILE, PREDICTIONS_HEADER, read_predictions, write_predictions
from src.evaluation.published import PublishedAccuracy, published_top1
from src.evaluation.records import Records, summarise
from src.evaluation.results import RESULTS_FILE, Results, read_results, write_results
from src.evaluation.results_table import percent_text, results_table

FIELDS = [
    *("model", "attention", "checkpoint", "data", "image_size", "precision", "device", "seeds", "top1", "top5"),
    *("loss", "top1_per_seed", "top1_std", "images_per_second", "peak_memory_mib", "versions", "command"),
    *("attention_options", "attention_memory", "attention_operations", "attention_peak_mib"),
    *("seconds", "random_features", "fast", "complete"),
    "num_evaluated",
]


def make_results(**changes):
    values = {
        "model": "t2t_vit_t_14",
        "attention": "sblocal",
        "checkpoint": {"path": "a/b.pth.tar", "sha256": "ab" * 32},
        "data": {"dir": "/data", "split": "val", "num_images": 50_000, "num_classes": 1000},
        "image_size": 224,
        "precision": "32-true",
        "device": "cpu",
        "seeds": [1111, 1112],
        "top1": 81.0,
        "top5": 95.5,
        "loss": 0.875,
        "top1_per_seed": [80.5, 81.5],
        "top1_std": math.sqrt(0.5),
        "images_per_second": 12.5,
        "peak_memory_mib": None,
        "versions": {"python": "3.11.7"},
        "command": "python run.py",
        "attention_options": [{"window": 49}, {"window": 12}],
        "attention_memory": 1 / 32,
        "seconds": 4000.0,
        "random_features": "seeds",
        "fast": True,
    }
    return Results(**{**values, **changes})


def make_records(**changes):
    """Four images, two seeds; hits of seed 0: first, third, none, fifth place; of seed 1: two firsts, a second."""
    values = {
        "targets": [0, 1, 2, 3],
        "top5_classes": [
            [[0, 1, 2, 3, 4], [0, 2, 1, 3, 4], [0, 1, 3, 4, 5], [0, 1, 2, 4, 3]],
            [[0, 1, 2, 3, 4], [1, 2, 0, 3, 4], [0, 2, 3, 4, 5], [0, 1, 2, 4, 5]],
        ],
        "top5_probabilities": np.tile([0.5, 0.2, 0.1, 0.05, 0.025], (2, 4, 1)),
        "losses": [[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 2.0]],
    }
    return Records(**{**values, **changes})


def draw(table, width=100):
    sink = io.StringIO()
    Console(width=width, file=sink).print(table)
    return sink.getvalue()


# Summary


def test_summary_by_hand():
    summary = summarise(make_records())
    assert summary == {
        "top1": 37.5,  # 1 of 4 and 2 of 4
        "top5": 75.0,  # 3 of 4 and 3 of 4
        "loss": 1.5,  # (2.5 + 0.5) / 2
        "top1_per_seed": [25.0, 50.0],
        "top1_std": pytest.approx(25.0 / math.sqrt(2.0), rel=1e-12),  # divided by K - 1
    }
    assert all(type(value) is float for value in summary["top1_per_seed"])


def test_one_seed_has_no_standard_deviation():
    records = make_records()
    one = Records(records.targets, records.top5_classes[:1], records.top5_probabilities[:1], records.losses[:1])
    assert summarise(one)["top1_std"] is None
    assert summarise(one)["top1"] == 25.0


def test_loss_is_summed_in_double_precision():
    losses = np.full((1, 100_000), 0.1, dtype=np.float32)
    records = Records(np.zeros(100_000, int), np.zeros((1, 100_000, 1), int), np.ones((1, 100_000, 1)), losses)
    assert summarise(records)["loss"] == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_fewer_than_five_classes_make_top5_complete():
    records = Records([0, 1], [[[1, 0, 2], [1, 0, 2]]], np.full((1, 2, 3), 1 / 3), [[0.0, 0.0]])
    summary = summarise(records)
    assert (summary["top1"], summary["top5"]) == (50.0, 100.0)


def test_tensors_are_taken_of_any_precision():
    reference = make_records()
    records = Records(
        torch.tensor(reference.targets, dtype=torch.int32),
        torch.tensor(reference.top5_classes),
        torch.tensor(reference.top5_probabilities).to(torch.bfloat16),
        torch.tensor(reference.losses, requires_grad=True),
    )
    assert summarise(records) == summarise(reference)
    assert records.top5_probabilities.dtype == np.float64


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": [0, 1, 2]},
        {"targets": [0.0, 1.0, 2.0, 3.0]},
        {"losses": [1.0, 2.0, 3.0, 4.0]},
        {"top5_probabilities": np.zeros((2, 4, 3))},
        {"top5_classes": np.zeros((2, 4, 6), int), "top5_probabilities": np.zeros((2, 4, 6))},
    ],
)
def test_records_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match="Records"):
        make_records(**changes)


def test_no_images_is_an_error_of_the_user():
    with pytest.raises(UserError, match="no images"):
        Records(np.zeros(0, int), np.zeros((1, 0, 5), int), np.zeros((1, 0, 5)), np.zeros((1, 0)))


# results.json


def test_results_file_has_the_fields_in_order_and_comes_back(tmp_path):
    results = make_results()
    path = write_results(tmp_path, results)
    assert path == tmp_path / RESULTS_FILE
    assert list(json.loads(path.read_text())) == FIELDS
    assert path.read_text().startswith('{\n  "model": "t2t_vit_t_14"')
    assert read_results(tmp_path) == results


def test_results_without_attention_or_standard_deviation(tmp_path):
    results = make_results(model="t2t_vit_14", attention=None, attention_options=None, attention_memory=None)
    write_results(tmp_path, results)
    content = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert content["attention"] is content["peak_memory_mib"] is content["attention_memory"] is None
    assert read_results(tmp_path) == results


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"loss": math.nan}, "loss is nan"),
        ({"top1_per_seed": [1.0, math.inf]}, r"top1_per_seed\[1\] is inf"),
        ({"attention_options": [{"scale": math.nan}]}, r"attention_options\[0\]\.scale is nan"),
    ],
)
def test_nan_is_reported_and_leaves_the_old_file(tmp_path, changes, culprit):
    write_results(tmp_path, make_results())
    before = (tmp_path / RESULTS_FILE).read_bytes()
    with pytest.raises(UserError, match=f"network produced NaN.*{culprit}"):
        write_results(tmp_path, make_results(**changes))
    assert (tmp_path / RESULTS_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [RESULTS_FILE]


def test_failure_while_writing_leaves_the_old_file(tmp_path):
    write_results(tmp_path, make_results())
    before = (tmp_path / RESULTS_FILE).read_bytes()
    with pytest.raises(TypeError):  # found half-way through the file
        write_results(tmp_path, make_results(seconds=object()))
    assert (tmp_path / RESULTS_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [RESULTS_FILE]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "[]", "not a JSON object"),
        (lambda text: text.replace("0.875", "NaN"), "NaN is not JSON"),
        (lambda text: text.replace('"loss"', '"lost"'), "lacks loss"),
        (lambda text: text.replace('"sha256"', '"md5"'), r"lacks checkpoint\.sha256"),
        (lambda text: text.replace("0.875", '"low"'), "loss must be a number"),
    ],
)
def test_damaged_results_are_reported(tmp_path, damage, message):
    path = write_results(tmp_path, make_results())
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=message) as caught:
        read_results(tmp_path)
    assert str(path) in str(caught.value)


def test_missing_files_are_reported(tmp_path):
    with pytest.raises(UserError, match=r"results\.json does not exist"):
        read_results(tmp_path)
    with pytest.raises(UserError, match=r"predictions\.csv does not exist"):
        read_predictions(tmp_path)


# predictions.csv


def test_predictions_file_to_the_letter(tmp_path):
    probabilities = np.tile([0.5, 0.25, 0.125, 1 / 16, 1.23456789e-9], (2, 4, 1))
    path = write_predictions(
        tmp_path, ["b/1.png", "a-b/0.png", 'a/c, "d".png', "a/b.png"], make_records(top5_probabilities=probabilities)
    )
    tail = "0.5,0.25,0.125,0.0625,1.2345679e-09"
    assert path.read_bytes().decode() == (
        "image,target,prediction_1,prediction_2,prediction_3,prediction_4,prediction_5,"
        "probability_1,probability_2,probability_3,probability_4,probability_5\n"
        f"a/b.png,3,0,1,2,4,3,{tail}\n"
        f'"a/c, ""d"".png",2,0,1,3,4,5,{tail}\n'
        f"a-b/0.png,1,0,2,1,3,4,{tail}\n"
        f"b/1.png,0,0,1,2,3,4,{tail}\n"
    )


def test_predictions_come_back(tmp_path):
    records = make_records()
    names = ["a.png", "b,c.png", "d\ne.png", "\udcff.png"]  # the last is a byte that is not UTF-8
    write_predictions(tmp_path, names, records)
    predictions = read_predictions(tmp_path)
    assert predictions.images == names
    np.testing.assert_array_equal(predictions.targets, records.targets)
    np.testing.assert_array_equal(predictions.classes, records.top5_classes[0])
    np.testing.assert_allclose(predictions.probabilities, records.top5_probabilities[0], rtol=1e-7)


def test_three_classes_leave_the_other_cells_empty(tmp_path):
    records = Records([0], [[[2, 0, 1]]], [[[0.5, 0.375, 0.125]]], [[1.0]])
    path = write_predictions(tmp_path, ["a.png"], records)
    assert path.read_text().splitlines()[1] == "a.png,0,2,0,1,,,0.5,0.375,0.125,,"
    assert read_predictions(tmp_path).classes.tolist() == [[2, 0, 1]]


def test_nan_probabilities_name_the_image_and_leave_nothing(tmp_path):
    probabilities = np.full((2, 4, 5), 0.1)
    probabilities[0, 2, 4] = math.nan
    with pytest.raises(UserError, match=r"network produced NaN.*c\.png"):
        write_predictions(
            tmp_path, ["a.png", "b.png", "c.png", "d.png"], make_records(top5_probabilities=probabilities)
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c", "a"], ["/a", "b", "c", "d"]])
def test_wrong_paths_are_refused(tmp_path, names):
    with pytest.raises(ValueError, match="write_predictions"):
        write_predictions(tmp_path, names, make_records())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("target", "label", 1), "header"),
        (lambda text: text.split("\n")[0] + "\n", "no images"),
        (lambda text: text[:-20], "line 5"),
        (lambda text: text.replace("b.png,1", "b.png,x"), "line 3"),
        (lambda text: text.replace("b.png", "a.png"), "twice"),
        (lambda text: "", "header"),
    ],
)
def test_damaged_predictions_are_reported(tmp_path, damage, message):
    path = write_predictions(tmp_path, ["a.png", "b.png", "c.png", "d.png"], make_records())
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=f"{PREDICTIONS_FILE} is damaged.*{message}"):
        read_predictions(tmp_path)


def test_header_is_that_of_the_contract():
    assert len(PREDICTIONS_HEADER) == 12
    assert PREDICTIONS_HEADER[:3] == ["image", "target", "prediction_1"]
    assert PREDICTIONS_HEADER[-1] == "probability_5"


# Published figures and the table


@pytest.mark.parametrize(
    ("model", "attention", "text"),
    [
        ("t2t_vit_t_14", "full", "81.7"),
        ("t2t_vit_t_14", None, "81.7"),
        ("t2t_vit_t_14", "local", "80.6"),
        ("t2t_vit_t_14", "performer", "77.8-79.0"),
        ("t2t_vit_t_14", "sblocal", "81.1"),
        ("t2t_vit_t_24", "full", "82.6"),
        ("t2t_vit_7", None, "71.7"),
        ("t2t_vit_14_wide", None, "79.8"),
    ],
)
def test_published_accuracies(model, attention, text):
    assert published_top1(model, attention, 1000, 224).text == text


@pytest.mark.parametrize(
    "arguments",
    [
        ("t2t_vit_t_14", "smyrf", 1000, 224),
        ("t2t_vit_t_19", "sblocal", 1000, 224),
        ("t2t_vit_14", "full", 1000, 224),
        ("t2t_vit_t_14", "full", 10, 224),
        ("t2t_vit_t_14", "full", 1000, 384),
        ("t2t_vit_t_14", "full", 1000, 224, 10_000),
        ("other", None, 1000, 224),
    ],
)
def test_nothing_is_published_for_anything_else(arguments):
    assert published_top1(*arguments) is None


def test_remeasured_accuracies_round_to_the_published_ones():
    for name, depth in (("t2t_vit", (7, 10, 12, 14, 19, 24)), ("t2t_vit_t", (14, 19, 24))):
        for layers in depth:
            figure = published_top1(f"{name}_{layers}", None, 1000, 224)
            assert figure.remeasured_top1 == pytest.approx(figure.low, abs=0.051)
            assert figure.remeasured_top5 > figure.remeasured_top1


@pytest.mark.parametrize(("top1", "difference"), [(77.0, -0.8), (78.5, 0.0), (79.5, 0.5)])
def test_difference_to_a_range(top1, difference):
    assert PublishedAccuracy(77.8, 79.0, "").difference(top1) == pytest.approx(difference)


def test_table_of_one_run():
    results = make_results()
    text = draw(results_table(results, results.published))
    for words in ("50,000 images of val", "sblocal", "81.00 ± 0.71 (2 seeds)", "95.50 %", "0.8750", "12.5", "3.1 %"):
        assert words in text
    assert "81.1 % (-0.10 here)" in text


def test_table_without_published_accuracy_or_several_seeds():
    data = {"dir": "/d", "split": "val", "num_images": 20, "num_classes": 10}
    results = make_results(data=data, attention=None, top1_std=None, top1_per_seed=[81.0], attention_memory=None)
    assert results.published is None
    text = draw(results_table(results, results.published))
    assert "published" not in text
    assert "±" not in text
    assert "columns" not in text
    assert "memory" not in text
    assert "81.00 %" in text


def test_results_of_a_part_of_the_images_say_so_and_are_not_compared_with_published_ones():
    results = make_results(complete=False, num_evaluated=1_200)
    assert make_results().published is not None
    assert results.published is None
    assert results_table(results, results.published).title == "1,200 of 50,000 images of val"


@pytest.mark.parametrize(
    ("fraction", "text"), [(1 / 32, "3.1 %"), (1.0, "100 %"), (None, "-"), (0.5, "50 %"), (1.25, "125 %")]
)
def test_percent_text(fraction, text):
    assert percent_text(fraction) == text


def test_results_are_built_from_a_summary():
    values = dataclasses.asdict(make_results())
    assert Results(**{**values, **summarise(make_records())}).top1 == 37.5
