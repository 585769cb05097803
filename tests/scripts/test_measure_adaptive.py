"""The ablation of adaptive attention: its variants against the operators, the choice of clusters, what is written."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from scatterbrain.ops.adaptive import adaptive_attention, plan_adaptive_attention
from scatterbrain.ops.clusters import landmark_attention
from scatterbrain.ops.full import naive_full_attention
from scatterbrain.ops.local import local_attention
from scripts.measure_adaptive import main
from src.analysis.approximation import load_model, relative_error
from src.analysis.experiments import adaptive
from src.models.attention_inputs import StageInputs, capture_stage_inputs
from tests.src.tasks.setup import IMAGE_SIZE, make_checkpoint, make_images

LENGTH, HEADS, DIM = 90, 2, 8
SMALL = {"window": 12, "num_landmarks": 12, "num_query_landmarks": 9, "density": 0.3, "num_steps": 1}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setattr(adaptive, "SIZES", SMALL)
    monkeypatch.setattr(adaptive, "SHORT", LENGTH)  # no halves


@pytest.fixture
def inputs():
    """Two samples with one head."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(HEADS, LENGTH, 1, DIM, generator=generator) for _ in range(3))
    return StageInputs(2 * query, 2 * key, value, DIM**-0.5)


@pytest.fixture
def tensors(inputs, tmp_path):
    """The same in a file, one sample of two heads."""
    content = zip("qkv", (inputs.query, inputs.key, inputs.value), strict=True)
    path = tmp_path / "tiny_qkv.npz"
    np.savez(path, **{f"{kind}3": x.permute(2, 1, 0, 3).numpy() for kind, x in content})
    return path


def operators(query, key, value):
    """Outputs of the operators that some variants are."""
    sizes, window = (SMALL["num_landmarks"], SMALL["num_query_landmarks"]), SMALL["window"]
    return {
        "all parts": adaptive_attention(query, key, value, *sizes, SMALL["density"], window),
        "no window": adaptive_attention(query, key, value, *sizes, SMALL["density"]),
        "no chosen clusters": landmark_attention(query, key, value, sizes[0], window),
        "window alone": local_attention(query, key, value, window),
        "landmarks alone": landmark_attention(query, key, value, sizes[0]),
        "4 steps": adaptive_attention(query, key, value, *sizes, SMALL["density"], window, num_steps=4),
        "density 0.15": adaptive_attention(query, key, value, *sizes, 0.15, window),
    }


def test_variants_are_the_operators(inputs):
    rows = {row["variant"]: row for row in adaptive.measure_layer("tiny", "3", inputs)}
    assert list(rows) == list(adaptive.VARIANTS)
    tensors = [x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value)]
    reference = naive_full_attention(*tensors, inputs.scale)[0]
    for name, out in operators(*tensors).items():
        expected = relative_error(out, reference).mean().item()
        assert rows[name]["error"] == pytest.approx(expected, rel=1e-4), name
        assert expected > 1e-3
    plan = plan_adaptive_attention(*tensors, SMALL["num_landmarks"], SMALL["num_query_landmarks"], SMALL["density"])
    assert rows["no window"]["share"] == pytest.approx(plan.density().mean().item())
    assert rows["landmarks alone"]["share"] == 0 < rows["no window"]["share"] <= SMALL["density"]
    assert rows["PISA 0.30"]["share"] == pytest.approx(64 / LENGTH)
    assert rows["oracle: heaviest keys"]["error"] < rows["all parts"]["error"] < rows["at random"]["error"]
    assert rows["no landmarks"]["error"] > rows["all parts"]["error"]


def test_short_sequences_have_smaller_sizes(inputs, monkeypatch):
    monkeypatch.setattr(adaptive, "SHORT", LENGTH + 1)
    rows = {row["variant"]: row for row in adaptive.measure_layer("tiny", "3", inputs)}
    tensors = [x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value)]
    out = adaptive_attention(*tensors, 6, 3, SMALL["density"], 6)
    expected = relative_error(out, naive_full_attention(*tensors, inputs.scale)[0]).mean().item()
    assert rows["all parts"]["error"] == pytest.approx(expected, rel=1e-4)


def test_clusters_are_taken_where_they_fit():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    taken = adaptive.take(scores, torch.tensor([5, 3, 6, 1]), room=7)
    # 5, not 3, not 6, 1; and 1, 6, nothing else
    assert taken.tolist() == [[True, False, False, True], [False, False, True, True]]


@pytest.mark.parametrize("choice", ["loss, one by one", "mass times std", "mass", "variance", "heaviest clusters"])
def test_scores_are_those_of_each_pair_of_clusters(inputs, choice):
    one = inputs.image(1)
    query, key, value = (x.transpose(1, 2) for x in (one.query, one.key, one.value))
    plan = plan_adaptive_attention(query, key, value, 5, 4, 0.2, scale=one.scale)
    found = adaptive.scores(choice, one, plan)
    query, key = query[0, 0].double(), key[0, 0].double()
    weights = (one.scale * query @ key.T).softmax(-1)
    found, expected = found.double(), torch.empty(4, 5, dtype=torch.float64)
    for a in range(4):
        of_query = plan.query_assignment[0, 0] == a
        for b in range(5):
            of_key = plan.key_assignment[0, 0] == b
            logits = one.scale * (key[of_key] - key.mean(0)) @ query[of_query].mean(0)
            mean, variance = logits.mean(), logits.var(correction=0)
            mass = of_key.sum() * mean.exp()
            expected[a, b] = {
                "loss, one by one": (mass * (variance / 2).exp() * (1 - (-variance).exp()).sqrt()).log(),
                "mass times std": (mass * variance.sqrt()).log(),
                "mass": mass.log(),
                "variance": variance,
                "heaviest clusters": weights[of_query][:, of_key].sum(),
            }[choice]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_end_to_end(tensors, tmp_path, capsys):
    folder = make_images(tmp_path / "images", 5)
    make_checkpoint(folder / "t7.pth", "t2t_vit_t_7")
    output, figure, maps = (tmp_path / name for name in ("a.json", "a.png", "m.png"))
    arguments = ["--checkpoint", folder / "t7.pth", "--data-dir", folder, "--num-images", 2, "--tensors", tensors]
    arguments += ["--output", output, "--figure", figure, "--maps", maps]
    assert main(list(map(str, arguments))) == 0
    content = json.loads(output.read_text())
    layers = {(row["network"], row["layer"]): (row["length"], row["samples"]) for row in content["results"]}
    stages = [(IMAGE_SIZE // 4) ** 2, (IMAGE_SIZE // 8) ** 2]
    assert layers == {
        ("demo stage 1", "1"): (stages[0], 2),
        ("demo stage 2", "2"): (stages[1], 2),
        ("tiny", "3"): (LENGTH, HEADS),
    }
    assert len(content["results"]) == 3 * len(adaptive.VARIANTS)
    assert all(row["error"] >= 0 <= row["share"] <= 1 for row in content["results"])
    assert str(tmp_path) not in output.read_text()
    line = next(line for line in capsys.readouterr().out.splitlines() if "all parts" in line)
    shown = re.findall(r"([\d.]+) \((\d+)\)", line)
    rows = [row for row in content["results"] if row["variant"] == "all parts"]
    assert shown == [(f"{row['error']:.3f}", f"{100 * row['share']:.0f}") for row in rows]
    for path in (figure, maps):
        with Image.open(path) as image:
            assert image.format == "PNG"


def test_parts_of_a_row_add_up(tmp_path):
    folder = make_images(tmp_path, 1)
    make_checkpoint(folder / "t7.pth", "t2t_vit_t_7")
    _, model = load_model(folder / "t7.pth")
    image = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    maps = adaptive.token_maps(capture_stage_inputs(model, image[None])[0], (0.5, 0.25))
    side = IMAGE_SIZE // 4
    assert maps.token == (side // 2, side // 4)
    full, whole, window, chosen, landmarks, difference = maps.grids.values()
    assert list(maps.grids)[2].startswith("window: 12 keys")
    assert (window > 0).sum() == 12
    assert whole.mean() == pytest.approx(1)
    np.testing.assert_allclose(window + chosen + landmarks, whole)
    np.testing.assert_allclose(whole - full, difference)
    np.testing.assert_allclose(full.sum(), whole.sum())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "There is nothing to measure the error on."),
        (["--checkpoint", "t7.pth"], "--checkpoint and --data-dir belong together: give both or none."),
        (["--tensors", "a.npz", "--maps", "m.png"], "--maps draws photographs. Give --checkpoint and --data-dir."),
    ],
)
def test_mistakes_are_one_line(given, message, capsys):
    assert main(given) == 1
    assert message in capsys.readouterr().err
