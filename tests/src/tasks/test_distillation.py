"""Distillation of learned features: the loss by its definition, that it falls, and checkpoints of what was learned."""

from __future__ import annotations

import json

import pytest
import torch

from scatterbrain.attention.full import FullAttention
from scatterbrain.attention.local import LocalAttention
from scatterbrain.attention.performer import PerformerAttention
from scatterbrain.attention.sblocal import SBLocalAttention
from scatterbrain.errors import UserError
from scatterbrain.ops.learned import FeatureMap
from scripts import distil_features as script
from src.models.attention_inputs import StageInputs, capture_calls, create_stage_attentions
from src.models.sequence_network import Network
from src.models.t2t_vit import create_t2t_vit
from src.tasks.distillation import distil_features, divergence, learned_stage_attentions, start_from_keys
from src.utils.checkpoint import load_checkpoint
from tests.src.tasks.setup import make_checkpoint, make_images

LENGTH, HEADS, WIDTH, SCALE = 48, 2, 8, 0.6


def inputs(number: int = 3, size: float = 2.0) -> list[StageInputs]:
    """Inputs of a layer whose keys lie in a few directions."""
    basis = size * torch.randn(HEADS, 3, WIDTH)
    layers = []
    for _ in range(number):
        query, key = (torch.einsum("blhd,hde->blhe", torch.randn(2, LENGTH, HEADS, 3), basis) for _ in range(2))
        layers.append(StageInputs(query, key, torch.randn(2, LENGTH, HEADS, 4), SCALE))
    return layers


def build(name: str, heads: int = HEADS, causal: bool = False) -> PerformerAttention | SBLocalAttention:
    options = {"softmax_temp": SCALE, "causal": causal, "learned_heads": heads}
    return SBLocalAttention(5, WIDTH, 6, **options) if name == "sblocal" else PerformerAttention(WIDTH, 6, **options)


@pytest.mark.parametrize("name", ["performer", "sblocal"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_loss_is_the_divergence_of_the_weights(name, causal):
    (layer,) = inputs(1, 0.7)
    attention, rows = build(name, causal=causal), torch.tensor([3, 40, 17])
    tensors = [x.double() for x in (layer.query, layer.key, layer.value)]
    weights = attention(*tensors, need_weights=True)[1][:, :, rows]
    full = FullAttention(SCALE, causal)(*tensors, need_weights=True)[1][:, :, rows]
    terms = torch.where(full > 0, full * (full / weights).log(), 0.0)
    assert divergence(attention, layer, rows).item() == pytest.approx(terms.sum(-1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["performer", "sblocal"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_distillation_lowers_the_loss_on_other_inputs(name, causal, heads):
    torch.manual_seed(5)
    layers = inputs(4)
    attention, rows = build(name, heads, causal), torch.arange(LENGTH)
    random = divergence(attention, layers[3], rows).item()
    losses = distil_features(attention, layers[:3], steps=150, lr=0.03, num_queries=16, seed=2)
    assert len(losses) == 150
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    learned = divergence(attention, layers[3], rows).item()
    start_from_keys(attention.learned_features, layers[0], torch.Generator().manual_seed(2))
    assert learned < 0.8 * divergence(attention, layers[3], rows).item()
    assert learned < 0.5 * random


def test_a_causal_language_model_is_distilled_layer_by_layer():
    """Captured with full attention, trained one layer at a time, put in its place."""
    network = Network([FullAttention(SCALE, causal=True) for _ in range(2)], 11, 11, LENGTH, 16, HEADS, 64, pool="none")
    for block in network.blocks:
        block.qkv.weight.data *= 2  # weights that differ from one another
    blocks, batches = list(network.blocks), torch.randint(11, (5, 4, LENGTH))
    full = [block.attention for block in blocks]
    captured = [capture_calls(full, lambda batch=batch: network(batch)) for batch in batches]
    assert captured[0][0].query.shape == (4, LENGTH, HEADS, WIDTH)
    assert captured[0][1].scale == SCALE
    before = network(batches[4])
    errors, divergences, rows = [], [], torch.arange(LENGTH)
    for steps in (1, 150):
        for block, layers in zip(blocks, zip(*captured[:4], strict=True), strict=True):
            block.attention = build("sblocal", causal=True)
            distil_features(block.attention, layers, steps=steps, lr=0.03, num_queries=16)
        errors.append((network(batches[4]) - before).norm().item())
        pairs = zip(blocks, captured[4], strict=True)
        divergences.append([divergence(block.attention, layer, rows).item() for block, layer in pairs])
    assert errors[1] < errors[0]
    assert all(learned < 0.9 * start for start, learned in zip(*divergences, strict=True)), divergences
    changed = batches[4].clone()
    changed[:, 30:] = 3
    assert torch.allclose(network(changed)[:, :30], network(batches[4])[:, :30], atol=1e-5)


def test_distillation_is_a_function_of_its_seed():
    layers = inputs()
    one, again, other = (build("sblocal") for _ in range(3))
    losses = [distil_features(each, layers, steps=5, seed=seed) for each, seed in ((one, 1), (again, 1), (other, 2))]
    assert losses[0] == losses[1] != losses[2]
    for x, y in zip(one.parameters(), again.parameters(), strict=True):
        assert torch.equal(x, y)


def test_the_start_is_a_smooth_form_of_landmarks():
    (layer,) = inputs(1)
    attention = build("performer", heads=1)
    features = attention.learned_features
    start_from_keys(features, layer, torch.Generator().manual_seed(0))
    centres = features.query_weight[0] / SCALE
    keys = layer.key.reshape(-1, WIDTH)
    assert ((centres[:, None] - keys).abs().amax(-1).amin(1) < 1e-5).all()
    query, key = layer.query[0, 0, 0], layer.key[0, 1, 0]
    weight, bias, norm = (part[0] for part in features.key_map)
    torch.testing.assert_close(
        weight @ key + bias - norm * key @ key, -SCALE / 2 * (key - centres).square().sum(1), rtol=1e-4, atol=1e-3
    )
    weight, bias, norm = (part[0] for part in FeatureMap(*features.query_map))
    torch.testing.assert_close(weight @ query + bias - norm * query @ query, SCALE * centres @ query)
    # more features than keys
    few = StageInputs(layer.query, layer.key[:, :2, :1], layer.value, SCALE)
    start_from_keys(features, few, torch.Generator().manual_seed(0))


def test_refuses():
    layers = inputs(1)
    without = LocalAttention(3), PerformerAttention(WIDTH)
    for attention, given in ((build("performer"), []), *((each, layers) for each in without)):
        with pytest.raises(UserError, match="takes an attention with learned_heads=H"):
            distil_features(attention, given)
    with pytest.raises(UserError, match="steps=0"):
        distil_features(build("performer"), layers, steps=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs in `val`, and a checkpoint."""
    folder = make_images(tmp_path_factory.mktemp("distillation"), 6)
    make_checkpoint(folder / "t7.pth", "t2t_vit_t_7")
    return folder


def test_the_script_end_to_end(folder, tmp_path, capsys):
    output = tmp_path / "r.json"
    given = [f"--checkpoint={folder}/t7.pth", f"--data-dir={folder}", "--memory-fraction=1/4", "--threads=1"]
    more = ["--steps=15", "--num-seeds=2", "--seed=4", f"--output={output}", f"--save={tmp_path}"]
    assert script.main([*given, *more]) == 0
    assert "sblocal learned: top-1 % " in capsys.readouterr().out
    content = json.loads(output.read_text())
    assert (content["num_training_images"], content["num_held_out_images"]) == (3, 3)
    rows = {(row["attention"], row["features"]): row for row in content["results"]}
    assert set(rows) == {
        *(("local", None), ("sbcluster", None)),
        *((name, kind) for name in ("performer", "sblocal") for kind in ("random", "keys", "learned")),
    }
    for name in ("performer", "sblocal"):
        assert [len(stage["per_seed"]) for stage in rows[name, "learned"]["divergence"]] == [2, 2]
        sizes = [[stage["sizes"] for stage in rows[name, kind]["stages"]] for kind in ("random", "learned")]
        assert sizes[0] == sizes[1]
        learned, start = (rows[name, kind]["divergence"][0]["mean"] for kind in ("learned", "keys"))
        assert learned < start

    # the checkpoint: what was learned with the first seed, in a network of the documented options
    path = tmp_path / "sblocal_learned.safetensors"
    config = {"name": "sblocal", "learned_heads": 1, "memory_fraction": 1 / 4}
    full, model = (create_t2t_vit("t2t_vit_t_7", each, 32, 5) for each in ("full", [config, config]))
    load_checkpoint(full, folder / "t7.pth")
    load_checkpoint(model, path)
    assert not model.has_random_features
    for module, untrained in zip(model.token_attentions, create_stage_attentions("sblocal", full, 1 / 4), strict=True):
        assert module.sizes() == untrained.sizes()
    with pytest.raises(UserError, match="the model has no"):
        load_checkpoint(full, path)
    with pytest.raises(UserError, match=r"it lacks .*learned_features"):
        load_checkpoint(model, folder / "t7.pth")


def test_random_features_as_parameters_are_random_features():
    model = create_t2t_vit("t2t_vit_t_7", "full", 32, 5).eval()
    layers = [StageInputs(*torch.randn(3, 1, n, 1, 64), scale=0.1) for n in (64, 16)]
    for name in ("performer", "sblocal"):
        learned = learned_stage_attentions("random", [tuple(layers)], {}, name, model, 1 / 4, 3)
        random = create_stage_attentions(name, model, 1 / 4, 3)
        for one, other, layer in zip(learned, random, layers, strict=True):
            expected = other(layer.query, layer.key, layer.value)[0]
            torch.testing.assert_close(one(layer.query, layer.key, layer.value)[0], expected, rtol=1e-3, atol=1e-4)


def test_refuses_a_folder_that_is_not_there(folder, capsys):
    given = [f"--checkpoint={folder}/t7.pth", f"--data-dir={folder}", f"--save={folder}/none"]
    assert script.main(given) == 1
    assert "none is not a folder. Make it first." in capsys.readouterr().err
    assert script.main([*given[:2], "--limit=1"]) == 1
    assert "One photograph cannot be learned from and measured on." in capsys.readouterr().err
