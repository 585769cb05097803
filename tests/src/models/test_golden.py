"""Attention modules and whole models against stored float64 outputs, see `tests/golden/README.md`."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.attention.full import FullAttention
from scatterbrain.attention.local import LocalAttention
from scatterbrain.attention.performer import PerformerAttention
from scatterbrain.attention.sblocal import SBLocalAttention
from src.checkpoints import convert_t2t_vit_state_dict, unconvert_key
from src.checkpoints.seeded_weights import seeded_tensor, seeded_weights
from src.models.t2t_vit import create_t2t_vit
from tests.helpers import assert_close, load_golden

# Two float64 evaluations in another order of sums; softmax and fourteen or more layers amplify their rounding.
DOUBLE = 1e-9
# The same in float32, whose rounding is 5e8 times larger and leaves a margin of ten.
SINGLE = 1e-4

ATTENTION_ENTRIES = sorted(load_golden("attention"))
MODEL_ENTRIES = sorted({key.rsplit(".", 1)[0] for key in load_golden("models")})


def build_attention(sizes: list[str], **options) -> torch.nn.Module:
    """Module of an entry: `["sblocal", "w7", "m10"]` and the like, rows in place."""
    kind, numbers = sizes[0], {size[0]: int(size[1:]) for size in sizes[1:]}
    if kind == "full":
        return FullAttention(**options)
    if kind == "local":
        return LocalAttention(numbers["w"], **options)
    if kind == "performer":
        module, rows = PerformerAttention(16, nb_features=numbers["m"], **options), numbers["m"]
    else:
        module, rows = SBLocalAttention(numbers["w"], 16, nb_features=numbers["m"], **options), numbers["m"] // 2
    module.double().projection_matrix.copy_(seeded_tensor("projection", (rows, 16)))
    return module


@pytest.mark.parametrize("entry", ATTENTION_ENTRIES)
def test_attention(golden, entry):
    parts = entry.split(".")
    causal, padded = "causal" in parts, "padded" in parts
    temperature = next(part for part in parts if part in ("default", "cold", "sharp"))
    module = build_attention(
        parts[: parts.index(temperature)], softmax_temp=0.3 if temperature == "cold" else None, causal=causal
    )
    query, key, value = (seeded_tensor(name, (2, 50, 2, 16)) for name in ("query", "key", "value"))
    if temperature == "sharp":
        query, key = 4 * query, 4 * key
    expected = torch.from_numpy(golden("attention")[entry])
    for dtype, ratio in ((torch.float64, DOUBLE), (torch.float32, SINGLE)):
        out, _ = module.to(dtype)(
            *(x.to(dtype) for x in (query, key, value)), key_lengths=torch.tensor([50, 37]) if padded else None
        )
        assert_close(f"{entry} ({dtype})", expected, out[:, ::3], ratio)


def test_attention_entries_are_all_there():
    # 6 kinds, 3 temperatures, causal or not, padded or not
    assert len(ATTENTION_ENTRIES) == 6 * 3 * 2 * 2


def build_model(entry: str) -> torch.nn.Module:
    """Float64 model of an entry, with its weights from names, in eval mode."""
    variant, _, attention = entry.removesuffix("]").partition("[")
    with torch.device("meta"):  # its own weights are not used, and slow to initialise
        model = create_t2t_vit(variant, attention=attention or None).eval()
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    rows = {
        key: seeded_tensor(f"projection{stage}", shapes.pop(key))
        for stage in (1, 2)
        if (key := f"patch_embed.attention{stage}.attn.attention.projection_matrix") in shapes
    }
    weights = seeded_weights({unconvert_key(key): shape for key, shape in shapes.items()})
    state_dict = convert_t2t_vit_state_dict(weights) | rows
    model.load_state_dict(state_dict, strict=True, assign=True)
    return model


@pytest.mark.parametrize("entry", MODEL_ENTRIES)
def test_model(golden, entry):
    stored = {
        key.removeprefix(entry + "."): value
        for key, value in golden("models").items()
        if key.rsplit(".", 1)[0] == entry
    }
    checked = set()
    model = build_model(entry)
    if "num_params" in stored:
        assert sum(parameter.numel() for parameter in model.parameters()) == stored["num_params"]
        checked.add("num_params")
    if "pos_embed" in stored:
        table = model.pos_embed.pe[0, ::29, ::31]
        assert_close("pos_embed", torch.from_numpy(stored["pos_embed"]).double(), table, DOUBLE)
        checked.add("pos_embed")

    tokens = []
    model.patch_embed.register_forward_hook(lambda module, inputs, out: tokens.append(out[:, ::17, ::5]))
    images = seeded_tensor("images", (2, 3, 224, 224))
    with torch.inference_mode():
        for dtype, ratio in ((torch.float64, DOUBLE), (torch.float32, SINGLE)):
            logits = model.to(dtype)(images.to(dtype))
            for name, result in (("tokens", tokens.pop()), ("logits", logits)):
                assert_close(f"{entry}.{name} ({dtype})", torch.from_numpy(stored[name]), result, ratio)
                checked.add(name)
    assert checked == stored.keys()


def test_model_entries_are_all_there():
    variants = {"t2t_vit_7", "t2t_vit_10", "t2t_vit_14", "t2t_vit_19", "t2t_vit_t_14", "t2t_vit_t_24"}
    swapped = {f"t2t_vit_t_14[{name}]" for name in ("full", "local", "performer", "sblocal")}
    assert set(MODEL_ENTRIES) == variants | swapped
