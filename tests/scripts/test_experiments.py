"""The experiments of the paper: their oracles and formulae against dense definitions, and the scripts end to end."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from PIL import Image

from scatterbrain.attention import create_attention
from scatterbrain.ops.common.dense import dense_logits, dense_low_rank_logits
from scatterbrain.ops.common.projection import draw_projection
from scatterbrain.ops.common.windows import window_mask
from scripts import experiment_regimes, experiment_residual
from src.analysis.approximation import effective_keys, load_model, relative_error
from src.analysis.experiments import regimes, residual
from src.models.attention_inputs import StageInputs, capture_stage_inputs
from tests.src.tasks.setup import make_checkpoint, make_images

LENGTH, WIDTH = 64, 8
MEMORY = 1 / 4


def tokens(data="normal", beta=1.0, seed=3):
    inputs = regimes.draw_tokens(data, LENGTH, WIDTH, num_centres=4, seed=seed)
    return StageInputs(inputs.query, inputs.key, inputs.value, beta * inputs.scale)


def refuses(tool, capsys, options, message):
    """The tool says what is wrong in one line and ends with status 1."""
    assert tool.main(options) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    assert line.startswith("Error: ")
    assert message in line


# Regimes --------------------------------------------------------------------------------------------------------------


def test_tokens_are_a_function_of_their_seed_and_have_variance_one():
    for data in regimes.DATA:
        one, again, other = (regimes.draw_tokens(data, 2000, 16, 500, seed) for seed in (1, 1, 2))
        for name in ("query", "key", "value"):
            x = getattr(one, name)
            assert x.shape == (1, 2000, 1, 16)
            assert torch.equal(x, getattr(again, name))
            assert not torch.equal(x, getattr(other, name))
            # 500 * 16 centres at least: five standard errors of a variance are 5 * (2 / 8000) ** 0.5
            assert x.var().item() == pytest.approx(1, abs=0.08)


def test_clustered_queries_and_keys_share_their_centres():
    inputs = regimes.draw_tokens("clustered", 4000, 16, 2, seed=0)
    query, key, value = (x[0, :, 0].unflatten(0, (2, 2000)).mean(1) for x in (inputs.query, inputs.key, inputs.value))
    # own deviations are 0.5, of means of 2,000 tokens 0.011, of differences 0.016; the centres' differences are about 1
    assert (query - key).abs().max() < 5 * 0.016
    assert (value - key).abs().max() > 0.5
    assert (query[0] - query[1]).abs().max() > 0.5


def test_nearest_of_rank_is_that_of_the_singular_values():
    weights = regimes.full_weights(tokens(beta=2.0)).float()
    values = torch.linalg.svdvals(weights.double())
    for rank in (1, 5, 30):
        found = regimes.nearest_of_rank(weights, rank)
        assert torch.linalg.matrix_rank(found, rtol=1e-5) == rank
        assert (weights - found).norm().item() == pytest.approx(values[rank:].norm().item(), rel=0.01)
    assert torch.equal(regimes.nearest_of_rank(weights, LENGTH), weights)


def test_keep_largest():
    matrix = torch.tensor([[1.0, -3.0, 2.0], [0.5, 0.1, -0.2]])
    assert torch.equal(regimes.keep_largest(matrix, 2), torch.tensor([[0.0, -3.0, 2.0], [0.5, 0.0, -0.2]]))


def test_both_oracles_err_less_with_each_turn():
    weights = regimes.full_weights(tokens("clustered", beta=1.5))
    errors = [(weights - regimes.largest_and_nearest(weights, 4, 3, steps)).norm().item() for steps in (1, 2, 4)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] < (weights - regimes.keep_largest(weights, 4)).norm()


def test_low_rank_logits_are_the_definition():
    query, key = (x.transpose(1, 2) for x in (tokens(beta=9.0).query, tokens().key))
    projection = draw_projection(5, WIDTH, 0)
    expected = dense_low_rank_logits(query, key, projection, 3.0, cosh=True)
    torch.testing.assert_close(regimes.low_rank_logits(query, key, projection, 3.0), expected, rtol=0, atol=1e-10)


def test_top_keys_are_exact_and_normalised():
    inputs = tokens(beta=2.0)
    found = regimes.top_key_attentions(inputs, MEMORY, seed=0)
    assert found["topk"].sizes == {"num_keys": 16}
    assert found["sbtopk"].sizes == {"num_keys": 8, "nb_features": 4}
    query, key = (x.transpose(1, 2) for x in (inputs.query, inputs.key))
    logits = dense_logits(query, key, inputs.scale)[0, 0]
    for item in found.values():
        assert item.memory == MEMORY
        order = logits.topk(item.sizes["num_keys"]).indices
        torch.testing.assert_close(item.weights.sum(-1), torch.ones(LENGTH, dtype=torch.float64))
        # exact up to one factor for each query
        ratios = item.weights.gather(1, order).log() - logits.gather(1, order)
        assert (ratios - ratios[:, :1]).abs().max() < 1e-9
    assert (found["topk"].weights > 0).sum(-1).eq(16).all()
    assert (found["sbtopk"].weights > 0).all()


@pytest.mark.parametrize("name", regimes.ATTENTIONS)
def test_matrix_and_output_of_an_attention_belong_together(name):
    inputs = tokens()  # without clear clusters, which little would move
    item = regimes.attentions(inputs, MEMORY, seed=2)[name]
    module = create_attention(name, LENGTH, WIDTH, softmax_temp=inputs.scale, memory_fraction=MEMORY, seed=2)
    out, weights = module(inputs.query, inputs.key, inputs.value, need_weights=True)
    # float32 sums of 64 terms; clusters that moved would change the first digit
    torch.testing.assert_close(item.out, out[0, :, 0].double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(item.weights, weights[0, 0].double(), rtol=0, atol=1e-5)
    assert item.sizes == module.sizes()
    assert item.memory <= MEMORY


def test_oracles_spend_the_same_memory():
    weights, value = regimes.full_weights(tokens()), tokens().value[0, :, 0].double()
    found = regimes.oracles(weights, value, MEMORY)
    assert {name: item.memory for name, item in found.items() if name != "uniform"} == dict.fromkeys(
        regimes.FAMILIES["oracles"], MEMORY
    )
    assert found["largest+svd"].sizes == {"num_keys": 8, "rank": 4}
    for item in found.values():
        torch.testing.assert_close(item.out, item.weights @ value)


def test_variance_is_that_of_the_formula():
    rows = regimes.measure_variance((0.25, 1.0), num_features=8, num_samples=20_000, seed=5)
    predicted = {(row["squared_norm"], row["rows"]): row["predicted"] for row in rows}
    assert predicted[1.0, "independent"] == pytest.approx((2.718281828 - 1) / 8)
    assert predicted[1.0, "cosh"] == pytest.approx((2.718281828 - 1) * (1 - 1 / 2.718281828) / 8)
    for row in rows:
        if "orthogonal" in row["rows"]:
            assert row["measured"] < predicted[row["squared_norm"], "independent"]
        else:
            # four standard errors of the sample; they are below a tenth, so neither formula passes for the other
            assert row["measured"] == pytest.approx(row["predicted"], abs=4 * row["std_error"])
            assert row["std_error"] < 0.05 * row["predicted"]


REGIMES = ["--length=64", "--width=8", "--centres=4", "--temperatures=0.5,4", "--memory-fractions=1/4"]
REGIMES += ["--num-seeds=2", "--seed=7", "--variance-samples=100", "--threads=1"]


def test_regimes_end_to_end(tmp_path, capsys):
    files = {name: tmp_path / f"{name}.{suffix}" for name, suffix in (("r", "json"), ("f", "png"), ("v", "pdf"))}
    options = [f"--output={files['r']}", f"--figure={files['f']}", f"--variance-figure={files['v']}"]
    assert experiment_regimes.main([*REGIMES, *options]) == 0
    assert "low-rank" in capsys.readouterr().out
    with Image.open(files["f"]) as image:
        assert image.format == "PNG"
    assert files["v"].stat().st_size > 0
    content = json.loads(files["r"].read_text())
    assert content["settings"]["temperatures"] == [0.5, 4]
    assert content["settings"]["seed"] == 7
    assert not set(content["settings"]) & {"output", "figure", "variance_figure"}
    assert len(content["variance"]) == 4 * len(regimes.SQUARED_NORMS)
    keys = [(row["data"], row["temperature"], row["memory_fraction"]) for row in content["regimes"]]
    assert keys == [(data, beta, 0.25) for data in ("normal", "clustered") for beta in (0.5, 4)]
    # each error is the mean over the seeds of what the parts give
    row = content["regimes"][3]
    samples, keys = [], []
    for seed in (7, 8):
        inputs = regimes.draw_tokens("clustered", 64, 8, 4, seed)
        inputs = StageInputs(inputs.query, inputs.key, inputs.value, 4 * 8**-0.5)
        weights = regimes.full_weights(inputs)
        found = regimes.approximate(inputs, 0.25, seed)
        out = weights @ inputs.value[0, :, 0].double()
        pairs = {name: (relative_error(x.weights[None], weights[None]), x.out) for name, x in found.items()}
        samples.append({name: (a.item(), relative_error(b[None], out[None]).item()) for name, (a, b) in pairs.items()})
        keys.append(effective_keys(weights).mean().item())
    assert row["effective_keys"]["mean"] == pytest.approx(statistics.fmean(keys))
    assert row["effective_keys"]["std"] == pytest.approx(statistics.stdev(keys))
    assert set(row["results"]) == set(samples[0])
    for name, result in row["results"].items():
        for number, kind in enumerate(("matrix_error", "output_error")):
            expected = [sample[name][number] for sample in samples]
            # float32, in places iterated
            assert result[kind]["mean"] == pytest.approx(statistics.fmean(expected), rel=1e-4)
            assert result[kind]["std"] == pytest.approx(statistics.stdev(expected), abs=1e-4 * max(expected))


def test_families_count_who_errs_least():
    def row(beta, *errors):
        names = ("largest", "svd", "largest+svd", "topk", "performer", "sbtopk", "local", "sblocal", "smyrf", "sbsmyrf")
        results = {name: {"matrix_error": {"mean": 9.0}} for name in names}
        results |= dict(zip(names, ({"matrix_error": {"mean": error}} for error in errors), strict=False))
        return {"data": "normal", "memory_fraction": 0.5, "temperature": beta, "results": results}

    rows = [row(1, 0.1, 0.9, 0.2), row(2, 0.5, 0.6, 0.3), row(3, 0.8, 0.1, 0.05)]
    summary = regimes.compare_families(rows)
    assert [each["family"] for each in summary] == list(regimes.FAMILIES)
    assert {name: summary[0][name] for name in ("regimes", "sparse", "low_rank", "both", "worst")} == {
        "regimes": 3,
        "sparse": 1,
        "low_rank": 0,
        "both": 2,
        "worst": {"sparse": 0.8, "low_rank": 0.9, "both": 0.3},
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length=5000"], "length=5000 is not valid. Give a whole number from 2 to 4096."),
        (["--data=normal,other"], "'other' is unknown"),
        (["--temperatures=1,-1"], "'-1' is not a positive number"),
        (["--memory-fractions=2"], "memory_fraction=2.0 has to lie in (0, 1]"),
        (["--seed=-1"], "seed=-1 is not valid"),
        (["--figure={folder}/f.jpg"], "the name has to end in .png, .pdf or .svg."),
        (["--output={folder}/none/r.json"], "has to be a file in a folder that exists"),
        (["--temperature=3"], "--help lists the options"),
    ],
)
def test_regimes_refuse(tmp_path, capsys, options, message):
    refuses(experiment_regimes, capsys, [*REGIMES, *(option.format(folder=tmp_path) for option in options)], message)


# Residual -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs in `val`, and a checkpoint."""
    folder = make_images(tmp_path_factory.mktemp("residual"), 5)
    make_checkpoint(folder / "t7.pth", "t2t_vit_t_7")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder / "t7.pth")[1]


@pytest.fixture(scope="module")
def stage(model):
    """Inputs of stage 1: 64 tokens."""
    torch.manual_seed(0)
    return capture_stage_inputs(model, torch.randn(1, 3, 32, 32))[0]


def test_singular_values_and_their_energy():
    matrix = torch.randn(7, 12)
    for each in (matrix, matrix.T):
        torch.testing.assert_close(residual.singular_values(each), torch.linalg.svdvals(matrix.double()))
    values = torch.tensor([3.0, 1.0, 1.0, 1.0])  # energies 9, 10, 11, 12 of 12
    assert [residual.values_for_energy(values, energy) for energy in (0.7, 0.75, 0.76, 0.9, 0.99)] == [1, 1, 2, 3, 4]
    left = residual.left_after(values, 12**0.5)
    torch.testing.assert_close(left, torch.tensor([12, 3, 2, 1, 0]).div(12).sqrt())


def test_masks_are_the_supports_of_the_attentions(model, stage):
    weights = regimes.full_weights(stage)
    for whole, keys in ((True, 16), (False, 8)):
        masks = residual.support_masks(stage, weights, model, 1, MEMORY, 5, whole)
        assert list(masks) == list(residual.SUPPORTS)
        assert masks["local"][1] == {"local_context": keys}
        assert torch.equal(masks["local"][0], window_mask(64, 64, keys))
        assert masks["smyrf"][1] == {"cluster_size": keys // 2, "num_hashes": 2}
        per_query = masks["smyrf"][0].sum(-1)
        assert keys // 2 <= per_query.min() <= per_query.max() <= keys
        assert masks["topk"][0].sum(-1).eq(keys).all()
        assert (weights * masks["topk"][0]).sum() > (weights * masks["smyrf"][0]).sum()


def test_fit_outside_a_support_is_no_worse_than_that_of_the_residual():
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.rand(20, 3, generator=generator) @ torch.rand(3, 20, generator=generator)
    mask = torch.rand(20, 20, generator=generator) < 0.2
    weights = torch.where(mask, 5 * torch.rand(20, 20, generator=generator), low_rank)
    rest = weights * ~mask
    least = (rest - regimes.nearest_of_rank(rest, 3)).norm() / weights.norm()
    errors = [residual.fit_outside(weights, mask, 3, steps) for steps in (1, 5, 100)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] <= least
    # outside the support a fit of rank 3 is exact, and found; the residual, with its holes, has none
    assert errors[-1] < 0.01 < 0.1 < least


def test_a_stage_by_the_dense_definitions(model, stage):
    found = residual.measure_stage(stage, model, 1, MEMORY, num_queries=32, seed=5)
    weights = regimes.full_weights(stage)
    rows = [2 * number + 1 for number in range(32)]
    mask = window_mask(64, 64, 8)[rows]
    parts = {"full": weights[rows], "sparse": weights[rows] * mask, "residual": weights[rows] * ~mask}
    item = found["local"]
    total = weights[rows].norm()
    assert item["energy_on_support"] == pytest.approx(((parts["sparse"].norm() / total) ** 2).item())
    for name, part in parts.items():
        values = torch.linalg.svdvals(part)
        assert item["num_values"][name]["0.9"] == residual.values_for_energy(values, 0.9)
        for rank in (0, 3, 20):
            assert item["left"][name][rank] == pytest.approx((values[rank:].norm() / total).item(), abs=1e-6)
    errors = item["equal_memory"]
    assert errors["sparse"] == pytest.approx(((weights[rows] * ~window_mask(64, 64, 16)[rows]).norm() / total).item())
    assert errors["low_rank"] == item["left"]["full"][8]
    assert errors["both"] == item["left"]["residual"][4]
    assert errors["both_free"] <= 1.001 * errors["both"]
    assert errors["rank"] == 4


def options(folder, *more):
    given = [f"--checkpoint={folder}/t7.pth", f"--data-dir={folder}", "--memory-fraction=1/4", "--threads=1"]
    return [*given, "--num-images=2", "--num-queries=20", *more]


def test_residual_end_to_end(folder, tmp_path, capsys):
    output, figure = tmp_path / "r.json", tmp_path / "r.png"
    assert experiment_residual.main(options(folder, f"--output={output}", f"--figure={figure}")) == 0
    assert "support" in capsys.readouterr().out
    with Image.open(figure) as image:
        assert image.format == "PNG"
    content = json.loads(output.read_text())
    assert content["model"] == "t2t_vit_t_7"
    assert len(content["images"]) == 2
    assert [(row["stage"], row["support"]) for row in content["results"]] == [
        (stage, support) for stage in (1, 2) for support in residual.SUPPORTS
    ]
    for row in content["results"]:
        assert row["num_tokens"] == (64, 16)[row["stage"] - 1]
        assert row["num_queries"] == (20, 16)[row["stage"] - 1]
        assert set(row["num_values"]) == set(row["left"]) == set(residual.PARTS)
        assert row["left"]["full"][0] == [0, pytest.approx(1)]
        assert row["left"]["full"][-1] == [row["num_queries"], pytest.approx(0, abs=1e-6)]


def test_maps_split_the_weight(model, stage):
    maps = residual.token_maps(stage, model, 1, MEMORY, seed=5)
    assert maps.token == (4, 4)
    grids = maps.grids
    assert grids["full attention"].mean() == pytest.approx(1)
    for name in ("window", "top-k"):
        split = grids[f"{name}: sparse part"] + grids[f"{name}: residual"]
        assert split == pytest.approx(grids["full attention"])
        assert (grids[f"{name}: sparse part"] > 0).sum() == 8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--checkpoint={folder}/none.pth"], "none.pth"),
        (["--split=none"], "none is not a folder"),
        (["--memory-fraction=3/4"], "--memory-fraction=0.75 has to lie in (0, 0.5]"),
        (["--seed=-1"], "--seed=-1 is not valid"),
        (["--num-images=0"], "'0' is not an integer of at least 1"),
        (["--figure={folder}/f.jpg"], "the name has to end in .png, .pdf or .svg."),
        (["--output={folder}/none/r.json"], "has to be a file in a folder that exists"),
    ],
)
def test_residual_refuses(folder, capsys, more, message):
    refuses(experiment_residual, capsys, options(folder, *(option.format(folder=folder) for option in more)), message)
