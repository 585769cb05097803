"""The fused linear map: its specification, the folded weights, the PyTorch implementation and the kernel against it."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import src.models.ops.fused_linear.plain as plain
from scatterbrain.errors import UserError
from src.models.ops.fused_linear import (
    FoldedLinear,
    Patches,
    fused_linear,
    fused_linear_with_statistics,
    naive_fused_linear,
)
from tests.helpers import assert_close, rms_ratio

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["naive", "torch", pytest.param("triton", marks=needs_triton)]
# roundings of one product, its statistics and one result; the errors of a long sum grow with its root
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-7, torch.float16: 7e-4, torch.bfloat16: 5e-3}


@dataclass(frozen=True)
class Case:
    """Sizes of one map: `shape` is that of x, rows or feature map."""

    shape: tuple[int, ...]
    out_features: int
    patches: Patches | None = None
    normalise: bool = True
    bias: bool = True
    gelu: bool = False
    residual: tuple[int, ...] | None = None

    @property
    def in_features(self) -> int:
        return self.shape[-1] * (1 if self.patches is None else self.patches.kernel**2)

    def __str__(self) -> str:
        name = "x".join(map(str, self.shape)) + f"-{self.out_features}"
        if self.patches is not None:
            name += f"-k{self.patches.kernel}s{self.patches.stride}p{self.patches.padding}"
        for flag in ("normalise", "bias", "gelu"):
            name += f"-{flag}" if getattr(self, flag) else ""
        return name + ("-residual" if self.residual else "")


class Weights:
    """Linear map and LayerNorm of a case, the latter with scales and shifts that matter."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str = DEVICE) -> None:
        self.case = case
        self.linear = nn.Linear(case.in_features, case.out_features, bias=case.bias)
        self.norm = nn.LayerNorm(case.in_features, eps=1e-3) if case.normalise else None
        if self.norm is not None:
            nn.init.normal_(self.norm.weight, 1.0, 0.3)
            nn.init.normal_(self.norm.bias)
        for module in (self.linear, self.norm):
            if module is not None:
                module.to(device, dtype).requires_grad_(False)

    def folded(self) -> FoldedLinear:
        return FoldedLinear(
            self.linear.weight, self.linear.bias, self.norm, gelu=self.case.gelu, patches=self.case.patches
        )

    def specification(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        norm = {}
        if self.norm is not None:
            norm = {"gamma": self.norm.weight, "beta": self.norm.bias, "eps": self.norm.eps}
        case = self.case
        return naive_fused_linear(
            x,
            self.linear.weight,
            self.linear.bias,
            normalise=case.normalise,
            gelu=case.gelu,
            patches=case.patches,
            residual=residual,
            **norm,
        )


CASES = [
    Case((2, 9, 37), 19, gelu=True, residual=(2, 9, 19)),
    Case((3, 70), 5),
    Case((2, 9, 64), 64, bias=False),
    Case((2, 3, 5, 33), 70, normalise=False, residual=(2, 3, 5, 70)),
    Case((2, 13, 11, 3), 24, Patches(7, 4, 2)),
    Case((2, 9, 8, 64), 24, Patches(3, 2, 1), residual=(20, 24)),
    Case((2, 9, 8, 5), 24, Patches(3, 2, 1), normalise=False, gelu=True),
    Case((1, 4, 4, 5), 7, Patches(2, 1, 2), bias=False),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_backends_equal_the_specification(case, dtype, backend):
    if backend == "triton" and (dtype == torch.float64 or (dtype == torch.bfloat16 and DEVICE == "cpu")):
        pytest.skip("not a dtype of the kernels, or of Triton's interpreter")
    weights = Weights(case, dtype)
    x = (torch.randn(case.shape) + 0.5).to(DEVICE, dtype)
    residual = None if case.residual is None else torch.randn(case.residual).to(DEVICE, dtype)
    out = fused_linear(x, weights.folded(), residual, backend=backend)
    assert out.dtype == dtype
    assert_close("out", weights.specification(x, residual), out, TOLERANCE[dtype])


def test_the_specification_is_what_pytorch_computes():
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    linear, norm = nn.Linear(27, 5).double(), nn.LayerNorm(27).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    patches = F.unfold(x, 3, stride=2, padding=1).transpose(1, 2)
    table = torch.randn(25, 5, dtype=torch.float64)
    expected = F.gelu(linear(norm(patches))) + table
    out = naive_fused_linear(
        x.permute(0, 2, 3, 1),
        linear.weight,
        linear.bias,
        normalise=True,
        gamma=norm.weight,
        beta=norm.bias,
        gelu=True,
        patches=Patches(3, 2, 1),
        residual=table,
    )
    assert_close("out", expected, out, 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("patches", [None, Patches(3, 2, 1)], ids=["rows", "patches"])
def test_writes_only_to_the_given_output(patches, backend):
    case = Case((2, 6, 40), 24) if patches is None else Case((2, 5, 3, 8), 24, patches)
    weights = Weights(case, torch.float32)
    x, table = torch.randn(case.shape, device=DEVICE), torch.randn(6, 24, device=DEVICE)
    tokens = torch.full((2, 7, 24), float("nan"), device=DEVICE)
    returned = fused_linear(x, weights.folded(), table, tokens[:, 1:], backend)
    assert returned.data_ptr() == tokens[:, 1:].data_ptr()
    assert_close("tokens", weights.specification(x, table), tokens[:, 1:], 1e-6)
    assert tokens[:, 0].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_of_any_layout(backend):
    weights = Weights(Case((2, 3, 4, 16), 8), torch.float32)
    x = torch.randn(2, 3, 4, 16, device=DEVICE)
    out = torch.full((8, 4, 3, 2), float("nan"), device=DEVICE).permute(3, 2, 1, 0)
    fused_linear(x, weights.folded(), out=out, backend=backend)
    assert_close("out", weights.specification(x), out, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_may_be_the_residual(backend):
    weights = Weights(Case((2, 9, 40), 24), torch.float32)
    x, residual = torch.randn(2, 9, 40, device=DEVICE), torch.randn(2, 9, 24, device=DEVICE)
    expected = weights.specification(x, residual)
    fused_linear(x, weights.folded(), residual, residual, backend)
    assert_close("out", expected, residual, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    case = Case((2, 6, 40), 24, residual=(2, 6, 24))
    weights = Weights(case, torch.float32)
    wide = torch.randn(2, 6, 120, device=DEVICE)
    residual = torch.randn(2, 24, 6, device=DEVICE).transpose(1, 2)
    for x in (wide[..., 40:80], wide[..., ::3], wide[:, :1, :40].expand(2, 6, 40)):
        out = fused_linear(x, weights.folded(), residual, backend=backend)
        assert_close("out", weights.specification(x, residual), out, 1e-6)
    # a row of each sample, as of a class token
    out = fused_linear(wide[:, 0, :40], weights.folded(), backend=backend)
    assert_close("out", weights.specification(wide[:, 0, :40]), out, 1e-6)
    # colours apart, as images come
    over_patches = Weights(Case((2, 9, 8, 3), 24, Patches(7, 4, 2)), torch.float32)
    images = torch.randn(2, 3, 9, 8, device=DEVICE)
    out = fused_linear(images.permute(0, 2, 3, 1), over_patches.folded(), backend=backend)
    assert_close("out", over_patches.specification(images.permute(0, 2, 3, 1)), out, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [Case((2, 40, 64), 32), Case((1, 15, 15, 3), 32, Patches(7, 4, 2))], ids=str)
def test_nearly_flat_rows(case, dtype, backend):
    # the standard deviation is a thousandth of the mean: errors of E[x^2] - E[x]^2 and of the sums of W would show
    weights = Weights(case, dtype)
    x = (2.6 + 4e-3 * torch.randn(case.shape)).to(DEVICE, dtype)
    out = fused_linear(x, weights.folded(), backend=backend)
    assert_close("out", weights.specification(x), out, {torch.float32: 3e-5, torch.float16: 2e-3}[dtype])
    flat = torch.full_like(x, 2.6)
    out = fused_linear(flat, weights.folded(), backend=backend)
    assert_close(
        "out of flat rows", weights.specification(flat), out, {torch.float32: 3e-5, torch.float16: 2e-3}[dtype]
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [Case((2, 40, 64), 32), Case((1, 15, 15, 3), 32, Patches(7, 4, 0))], ids=str)
def test_rows_far_from_zero(case, backend):
    # E[x^2] - E[x]^2 in float32 would err by 6 %; products of 1000 leave a few times 1000 roundings of one
    weights = Weights(case, torch.float32)
    x = 1000 + torch.randn(case.shape, device=DEVICE)
    out = fused_linear(x, weights.folded(), backend=backend)
    assert_close("out", weights.specification(x), out, 5e-4)


@needs_triton
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 3])
def test_settings_of_the_kernel_change_nothing(parts, group):
    from src.models.ops.fused_linear.triton import Tiles

    for case in (Case((70, 100), 90, gelu=True, residual=(70, 90)), Case((2, 13, 11, 3), 90, Patches(7, 4, 2))):
        weights = Weights(case, torch.float32)
        x = torch.randn(case.shape, device=DEVICE)
        residual = None if case.residual is None else torch.randn(case.residual, device=DEVICE)
        folded = weights.folded()
        folded.tiles = Tiles(16, 16, 32, parts=parts, group=group)
        out = fused_linear(x, folded, residual, backend="triton")
        assert_close("out", weights.specification(x, residual), out, TOLERANCE[torch.float32])


@needs_triton
@pytest.mark.parametrize("setting", [{"parts": 4}, {"stages": 1}], ids=str)
def test_settings_that_would_give_wrong_results_are_refused(setting):
    from src.models.ops.fused_linear.triton import Tiles

    with pytest.raises(UserError, match="has to be 1, 2 or 3, and stages="):
        Tiles(16, 16, 32, **setting)


@needs_triton
def test_gelu_of_half_precision_is_within_its_bound():
    # the identity, so that what GELU gets is known
    folded = FoldedLinear(torch.eye(16, dtype=torch.float16, device=DEVICE), gelu=True)
    x = torch.cat([torch.linspace(-8, 8, 4000), torch.linspace(-60, 60, 2400)]).view(-1, 16).to(DEVICE, torch.float16)
    error = (fused_linear(x, folded, backend="triton").double() - F.gelu(x.double())).abs()
    # the polynomial's bound, and the rounding of the result
    assert (error <= 7e-5 + x.double().abs() * 2**-11).all()


def test_folding_is_done_in_double_precision():
    linear, norm = nn.Linear(64, 32), nn.LayerNorm(64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    folded = FoldedLinear(linear.weight, linear.bias, norm)
    scaled = linear.weight.double() * norm.weight.double()
    assert torch.equal(folded.matrix(), (scaled - scaled.mean(1, keepdim=True)).float())
    assert torch.equal(folded.bias, (linear.weight.double() @ norm.bias.double() + linear.bias.double()).float())
    assert not any(buffer.requires_grad for buffer in folded.buffers())


def test_pytorch_without_onednn(monkeypatch):
    case = CASES[0]
    weights = Weights(case, torch.float32)
    x, residual = torch.randn(case.shape, device=DEVICE), torch.randn(case.residual, device=DEVICE)
    monkeypatch.setattr(plain, "has_fused_products", lambda x: False)
    out = fused_linear(x, weights.folded(), residual, backend="torch")
    assert_close("out", weights.specification(x, residual), out, TOLERANCE[torch.float32])


def test_used_weights_can_be_copied_and_converted():
    # oneDNN's copy of them, made by the first call, is neither copied nor kept
    weights = Weights(Case((9, 40), 24), torch.float32)
    x, folded = torch.randn(9, 40, device=DEVICE), weights.folded()
    expected = fused_linear(x, folded, backend="torch")
    for used in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded)), folded):
        assert torch.equal(fused_linear(x, used, backend="torch"), expected)
    with torch.no_grad():
        folded.weight.mul_(2)
        folded.to(DEVICE)
    assert rms_ratio(expected, fused_linear(x, folded, backend="torch")) > 0.1
    assert fused_linear(x.double(), folded.double(), backend="torch").dtype == torch.float64


def test_rows_may_be_of_another_number_than_at_the_first_call():
    weights = Weights(Case((9, 40), 24), torch.float32)
    folded = weights.folded()
    for rows in (9, 1, 300):
        x = torch.randn(rows, 40, device=DEVICE)
        assert_close("out", weights.specification(x), fused_linear(x, folded, backend="torch"), 5e-7)


def test_weights_of_patches_are_those_of_the_convolution():
    weight = torch.randn(5, 3 * 49)
    folded = FoldedLinear(weight, patches=Patches(7, 4, 2))
    assert torch.equal(folded.convolution_weight(), weight.view(5, 3, 7, 7))
    assert torch.equal(folded.matrix(), weight)


@needs_triton
@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
def test_the_operators_keep_pytorchs_rules(case):
    import src.models.ops.fused_linear.triton  # noqa: F401 - registers them

    weights = Weights(case, torch.float32)
    folded = weights.folded()
    x = torch.randn(case.shape, device=DEVICE)
    out = torch.zeros(folded.output_shape(x), device=DEVICE)
    residual = torch.randn(case.residual, device=DEVICE).expand_as(out)
    patches = [] if case.patches is None else [case.patches.kernel, case.patches.stride, case.patches.padding]
    settings = (folded.eps, folded.segment, folded.normalise, folded.gelu, patches, [])
    given = (x, folded.weight, folded.bias, folded.sums, residual, None)
    torch.library.opcheck(torch.ops.scatterbrain.fused_linear, (*given, *settings, False))
    torch.library.opcheck(torch.ops.scatterbrain.fused_linear, (*given, *settings, True))
    torch.library.opcheck(torch.ops.scatterbrain.fused_linear_out, (*given, out, *settings))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [16, 32, 96])
def test_returned_statistics_are_those_of_the_rows(backend, columns):
    first = Weights(Case((2, 9, 40), 96, normalise=False, residual=(2, 9, 96)), torch.float32)
    second = Weights(Case((2, 9, 96), 24), torch.float32)
    x, residual = torch.randn(2, 9, 40, device=DEVICE), torch.randn(2, 9, 96, device=DEVICE)
    # a nearly flat row, as above
    residual[0, 0] = 2.6 + 4e-3 * torch.randn(96, device=DEVICE)
    x[0, 0] = 0
    folded, behind = first.folded(), second.folded()
    if backend == "triton":
        from src.models.ops.fused_linear.triton import Tiles

        folded.tiles = Tiles(16, min(columns, 32), 32, parts=3 if columns == 96 else 1)
    y, statistics = fused_linear_with_statistics(x, folded, residual, backend)
    assert_close("output", first.specification(x, residual), y, 1e-6)
    assert (statistics is not None) == (backend == "triton")
    out = fused_linear(y, behind, backend=backend, statistics=statistics)
    assert_close("out with statistics", second.specification(y), out, 3e-5)
    if statistics is not None:
        # other numbers there give another result: they are read
        changed = fused_linear(y, behind, backend=backend, statistics=2 * statistics)
        assert rms_ratio(out.double(), changed) > 0.1


@needs_triton
def test_no_statistics_of_parts_of_unequal_size():
    weights = Weights(Case((9, 40), 70, normalise=False), torch.float32)
    assert (
        fused_linear_with_statistics(torch.randn(9, 40, device=DEVICE), weights.folded(), backend="triton")[1] is None
    )


@pytest.fixture
def persistent_runs(monkeypatch):
    """The persistent kernel, also where there is no Hopper GPU and for small maps; sizes of the maps that it took."""
    persistent = pytest.importorskip("src.models.ops.fused_linear.persistent", reason="needs Triton 3.4")
    kernel_module = pytest.importorskip("src.models.ops.fused_linear.triton")
    if DEVICE == "cuda" and not persistent._is_hopper(torch.device(DEVICE)):
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setattr(persistent, "_is_hopper", lambda device: True)
    for name, value in {"MIN_ROWS": 16, "ROWS": 64, "COLUMNS": 64, "INNER": 32, "PROGRAMS": 1}.items():
        monkeypatch.setattr(persistent, name, value)
    sizes = []

    def launch(x, weight, *arguments):
        ran = persistent.launch_persistent(x, weight, *arguments)
        sizes.extend([(len(x), x.shape[1], len(weight))] * ran)
        return ran

    monkeypatch.setattr(kernel_module, "launch_persistent", launch)
    return sizes


PERSISTENT_DTYPES = [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter has no bfloat16


@needs_triton
@pytest.mark.parametrize("dtype", PERSISTENT_DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case((2, 97, 96), 128, gelu=True),  # more tiles than programs, the last one of 2 rows
        Case((2, 97, 96), 128, normalise=False, residual=(2, 97, 128)),
        Case((60, 64), 192, bias=False, residual=(60, 192)),
        Case((64, 32), 64, normalise=False, bias=False),
    ],
    ids=str,
)
def test_the_persistent_kernel_equals_the_specification(case, dtype, persistent_runs):
    weights = Weights(case, dtype)
    x = (torch.randn(case.shape) + 0.5).to(DEVICE, dtype)
    residual = None if case.residual is None else torch.randn(case.residual).to(DEVICE, dtype)
    out = torch.full((*case.shape[:-1], case.out_features), float("nan"), dtype=dtype, device=DEVICE)
    fused_linear(x, weights.folded(), residual, out, backend="triton")
    assert persistent_runs == [(x.numel() // x.shape[-1], x.shape[-1], case.out_features)]
    assert_close("out", weights.specification(x, residual), out, TOLERANCE[dtype])


@needs_triton
def test_statistics_of_the_persistent_kernel_are_those_of_the_rows(persistent_runs):
    first = Weights(Case((2, 70, 64), 128, normalise=False, residual=(2, 70, 128)), torch.float16)
    second = Weights(Case((2, 70, 128), 64), torch.float16)
    x, residual = (torch.randn(2, 70, size).to(DEVICE, torch.float16) for size in (64, 128))
    residual[0, 0] = 2.6 + 4e-3 * torch.randn(128, device=DEVICE)  # a nearly flat row
    residual[1, :, :32] += 30  # the halves of a tile differ
    x[0, 0] = 0
    y, statistics = fused_linear_with_statistics(x, first.folded(), residual, "triton")
    assert statistics.shape == (2, 2, 140)
    parts = y.double().view(140, 2, 64)
    means = parts.mean(2)
    squares = (parts - means[..., None]).square().sum(2)
    assert_close("means", means.T, statistics[:, 0], 1e-6)
    assert_close("squares", squares.T, statistics[:, 1], 1e-6)
    out = fused_linear(y, second.folded(), backend="triton", statistics=statistics)
    assert_close("out with statistics", second.specification(y), out, 2e-3)
    assert len(persistent_runs) == 2


@needs_triton
def test_what_tma_cannot_read_goes_to_the_other_kernel(persistent_runs):
    case = Case((40, 64), 128, residual=(40, 128))
    weights = Weights(case, torch.float16)
    wide = torch.randn(40, 200, device=DEVICE).half()
    residual, narrow = torch.randn(40, 128, device=DEVICE).half(), torch.randn(1, 128, device=DEVICE).half()
    for x, added, runs in (
        (wide[:, 8:72], residual, 1),
        (wide[:, 1:65], residual, 0),  # begins at no multiple of 16 bytes
        (wide[:, 8:72], narrow, 0),  # a table that is repeated
        (torch.randn(40, 65, device=DEVICE).half()[:, :64], residual, 0),  # nor do the rows
    ):
        persistent_runs.clear()
        out = fused_linear(x, weights.folded(), added, backend="triton")
        assert len(persistent_runs) == runs
        assert_close("out", weights.specification(x, added), out, TOLERANCE[torch.float16])
    folded = weights.folded()
    persistent_runs.clear()
    with torch.no_grad():
        for x, weight in ((torch.randn(40, 64), folded), (torch.randn(15, 64).half(), folded)):
            fused_linear(x.to(DEVICE), weight.to(x.dtype), backend="triton")
    assert persistent_runs == []


@needs_triton
def test_compiles_as_one_graph():
    from src.models.ops.fused_linear.triton import Tiles

    case = Case((2, 9, 8, 64), 32, Patches(3, 2, 1), residual=(20, 32))
    weights = Weights(case, torch.float32)
    folded = weights.folded()
    folded.tiles = Tiles(16, 16, 32)
    after = Weights(Case((2, 20, 32), 16), torch.float32)
    behind = after.folded()
    x, table = torch.randn(case.shape, device=DEVICE), torch.randn(case.residual, device=DEVICE)

    def function(x):
        tokens = x.new_zeros(2, 21, 32)
        fused_linear(x, folded, table, tokens[:, 1:], "triton")
        out, statistics = fused_linear_with_statistics(x, folded, table, "triton")
        return tokens, out, fused_linear(out, behind, backend="triton", statistics=statistics)

    with torch.inference_mode():
        tokens, out, last = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    expected = weights.specification(x, table)
    assert_close("last", after.specification(out), last, 1e-6)
    assert_close("tokens", F.pad(expected, (0, 0, 1, 0)), tokens, 1e-6)
    assert_close("out", expected, out, 1e-6)


def test_an_empty_batch_gives_an_empty_output():
    for case in (Case((0, 4, 16), 8), Case((0, 6, 6, 3), 8, Patches(3, 2, 1))):
        weights = Weights(case, torch.float32)
        for backend in ["naive", "torch"] + ["triton"] * HAS_TRITON:
            out = fused_linear(torch.randn(case.shape, device=DEVICE), weights.folded(), backend=backend)
            assert out.numel() == 0
            assert out.shape[-1] == 8


def refusal(match: str):
    return pytest.raises(UserError, match=match)


def test_refusals():
    folded = FoldedLinear(torch.randn(8, 16), torch.randn(8))
    x = torch.randn(2, 16)
    with refusal(r"x \(2, 15\) has to be rows \(\.\.\., 16\)"):
        fused_linear(x[:, :15], folded)
    with refusal("x is torch.float64 .* fold the weights again"):
        fused_linear(x.double(), folded)
    with refusal(r"residual \(3, 8\) does not expand to the output, \(2, 8\)"):
        fused_linear(x, folded, torch.randn(3, 8))
    with refusal(r"out \(2, 9\) has to be of the shape of the output"):
        fused_linear(x, folded, out=torch.empty(2, 9))
    with refusal(r"statistics \(1, 2, 3\) are not those of x \(2, 16\)"):
        fused_linear(x, folded, statistics=torch.zeros(1, 2, 3))
    with refusal("has no gradients. Call it under torch.inference_mode"):
        fused_linear(x.requires_grad_(), folded)
    with refusal("backend='cuda' is not available here"):
        fused_linear(x.detach(), folded, backend="cuda")
    over_patches = FoldedLinear(torch.randn(8, 27), patches=Patches(3, 2, 0))
    with refusal(r"has to be a feature map \(B, height, width, 3\)"):
        fused_linear(torch.randn(2, 3, 9, 9), over_patches)
    with refusal("A map of 2 x 9 pixels holds no patch of 3 x 3"):
        fused_linear(torch.randn(2, 2, 9, 3), over_patches)
    with refusal("has to be floating-point"):
        FoldedLinear(torch.ones(3, 3, dtype=torch.int64))
    with refusal(r"has to be \(N, C \* 3\^2\)"):
        FoldedLinear(torch.randn(8, 16), patches=Patches(3, 2, 1))
    with refusal(r"norm is a LayerNorm over \(15,\)"):
        FoldedLinear(torch.randn(8, 16), norm=nn.LayerNorm(15))


# Sizes of the published models at 16 images of 224 pixels.
REAL_CASES = [
    Case((16, 224, 224, 3), 192, Patches(7, 4, 2), bias=False),
    Case((16, 56, 56, 64), 192, Patches(3, 2, 1), bias=False),
    Case((16, 28, 28, 64), 384, Patches(3, 2, 1), normalise=False, residual=(196, 384)),
    Case((16, 197, 384), 1152, bias=False),
    Case((16, 197, 384), 1152, gelu=True),
    Case((16, 197, 384), 384, normalise=False, residual=(16, 197, 384)),
    Case((16, 197, 1152), 384, normalise=False, residual=(16, 197, 384)),
    Case((16, 384), 1000),
    Case((3, 197, 448), 1344),
]


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("case", REAL_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_real_sizes_on_a_gpu(case, dtype):
    weights = Weights(case, dtype)
    x = torch.randn(case.shape).to(DEVICE, dtype)
    residual = None if case.residual is None else torch.randn(case.residual).to(DEVICE, dtype)
    expected = weights.specification(x, residual)
    for backend in ("torch", "triton"):
        out = fused_linear(x, weights.folded(), residual, backend=backend)
        assert_close(f"out of {backend}", expected, out, {torch.float32: 2e-6}.get(dtype, TOLERANCE[dtype]))
