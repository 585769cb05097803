"""The tail of a token stage: its specification, the PyTorch implementation and the kernel against it."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from scatterbrain.errors import UserError
from src.models.modules.token_stage import TokenTransformer
from src.models.ops.token_tail import FoldedTail, naive_token_tail, token_tail
from tests.helpers import assert_close

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["naive", "torch", pytest.param("triton", marks=needs_triton)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-7, torch.float16: 7e-4, torch.bfloat16: 5e-3}


class Tail:
    """Layers of a tail, its LayerNorm with scales and shifts that matter."""

    def __init__(self, width: int, hidden: int, dtype: torch.dtype, bias: bool = True) -> None:
        self.projection = nn.Linear(width, width, bias=bias)
        self.norm = nn.LayerNorm(width, eps=1e-3)
        self.first = nn.Linear(width, hidden, bias=bias)
        self.second = nn.Linear(hidden, width, bias=bias)
        nn.init.normal_(self.norm.weight, 1.0, 0.3)
        nn.init.normal_(self.norm.bias)
        for layer in (self.projection, self.norm, self.first, self.second):
            layer.to(DEVICE, dtype).requires_grad_(False)

    def folded(self) -> FoldedTail:
        return FoldedTail(self.projection, self.norm, self.first, self.second)

    def specification(self, attended: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        linears = [(layer.weight, layer.bias) for layer in (self.projection, self.first, self.second)]
        norm = (self.norm.weight, self.norm.bias, self.norm.eps)
        return naive_token_tail(attended, value, linears[0], norm, *linears[1:])


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention's output, and values that are a slice of a fused tensor."""
    wide = torch.randn(*shape[:-1], 3 * shape[-1]).to(DEVICE, dtype)
    return torch.randn(shape).to(DEVICE, dtype), wide[..., 2 * shape[-1] :]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "hidden", "bias"), [(64, 64, True), (20, 37, True), (16, 50, False)])
def test_backends_equal_the_specification(width, hidden, bias, dtype, backend):
    if backend == "triton" and (dtype == torch.float64 or (dtype == torch.bfloat16 and DEVICE == "cpu")):
        pytest.skip("not a dtype of the kernels, or of Triton's interpreter")
    tail = Tail(width, hidden, dtype, bias)
    attended, value = draw((2, 45, width), dtype)
    out = token_tail(attended, value, tail.folded(), backend)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close("out", tail.specification(attended, value), out, TOLERANCE[dtype])


def test_the_specification_is_what_a_token_stage_computes():
    class Identity(nn.Module):
        def forward(self, query, key, value):
            return query, None

    stage = TokenTransformer(20, 16, Identity()).double()
    nn.init.normal_(stage.norm2.weight)
    nn.init.normal_(stage.norm2.bias)
    x = torch.randn(2, 5, 20, dtype=torch.float64)
    query, _, value = stage.attn.qkv(stage.norm1(x)).chunk(3, dim=-1)
    out = naive_token_tail(
        query,
        value,
        (stage.attn.proj.weight, stage.attn.proj.bias),
        (stage.norm2.weight, stage.norm2.bias, stage.norm2.eps),
        (stage.mlp.fc1.weight, stage.mlp.fc1.bias),
        (stage.mlp.fc2.weight, stage.mlp.fc2.bias),
    )
    assert_close("out", stage(x), out, 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_any_layout_stay_as_they_are(backend):
    tail = Tail(16, 24, torch.float32)
    attended = torch.randn(3, 16, 7, device=DEVICE).transpose(1, 2)
    value = torch.randn(7, 3, 32, device=DEVICE).transpose(0, 1)[..., ::2]
    before = attended.clone(), value.clone()
    out = token_tail(attended, value, tail.folded(), backend)
    assert_close("out", tail.specification(attended, value), out, TOLERANCE[torch.float32])
    assert torch.equal(attended, before[0])
    assert torch.equal(value, before[1])


@needs_triton
@pytest.mark.parametrize("repeats", [1, 3])
def test_settings_of_the_kernel_change_nothing(repeats):
    from src.models.ops.token_tail.triton import Tiles

    tail = Tail(16, 16, torch.float32)
    attended, value = draw((3, 35, 16), torch.float32)
    folded = tail.folded()
    folded.tiles = Tiles(16, repeats)
    assert_close("out", tail.specification(attended, value), token_tail(attended, value, folded, "triton"), 5e-7)


@needs_triton
def test_the_operator_keeps_pytorchs_rules_and_compiles():
    import src.models.ops.token_tail.triton  # noqa: F401 - registers it

    tail = Tail(16, 24, torch.float32)
    folded = tail.folded()
    attended, value = draw((2, 9, 16), torch.float32)
    weights = (folded.projection, folded.first, folded.second, folded.biases)
    torch.library.opcheck(torch.ops.scatterbrain.token_tail, (attended, value, *weights, folded.eps, []))

    def function(attended, value):
        return token_tail(attended, value, folded, "triton")

    with torch.inference_mode():
        out = torch.compile(function, fullgraph=True, backend="aot_eager")(attended, value)
    assert_close("out", tail.specification(attended, value), out, TOLERANCE[torch.float32])


def test_an_empty_batch_gives_an_empty_output():
    tail = Tail(16, 24, torch.float32)
    for backend in ["naive", "torch"] + ["triton"] * HAS_TRITON:
        assert token_tail(*draw((0, 9, 16), torch.float32), tail.folded(), backend).shape == (0, 9, 16)


def test_refusals():
    tail = Tail(16, 24, torch.float32)
    folded = tail.folded()
    x = torch.randn(2, 5, 16, device=DEVICE)
    with pytest.raises(UserError, match=r"attended \(2, 5, 16\) and value \(2, 4, 16\) have to be \(\.\.\., 16\)"):
        token_tail(x, x[:, :4], folded)
    with pytest.raises(UserError, match=r"value is torch.float64 .* fold the weights again"):
        token_tail(x, x.double(), folded)
    with pytest.raises(UserError, match="has no gradients"):
        token_tail(x, x.clone().requires_grad_(), folded)
    with pytest.raises(UserError, match=r"they have to be \(D, D\), \(D,\), \(F, D\) and \(D, F\)"):
        FoldedTail(tail.projection, tail.norm, tail.second, tail.first)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("repeats", [1, 4])
def test_real_sizes_on_a_gpu(dtype, repeats):
    from src.models.ops.token_tail.triton import Tiles

    tail = Tail(64, 64, dtype)
    folded = tail.folded()
    if repeats > 1:
        folded.tiles = Tiles(64, repeats)
    attended, value = draw((16, 3136, 64), dtype)
    expected = tail.specification(attended, value)
    for backend in ("torch", "triton"):
        assert_close(f"out of {backend}", expected, token_tail(attended, value, folded, backend), TOLERANCE[dtype])
