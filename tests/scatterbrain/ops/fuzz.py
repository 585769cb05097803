"""Random calls of the Triton kernels against the float64 specifications.

    python -m tests.scatterbrain.ops.fuzz --cases 2000 --first 1000   # without a GPU: small cases

A case follows from its seed alone. Inputs are views into buffers that hold nan everywhere else, in front, behind and in
the gaps between rows; keys past the length of a sequence are nan; outputs and workspaces hold nan, or the largest
integer, before the kernels write them. So one element read too far, or one not written, is seen.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from scatterbrain.ops.adaptive import adaptive_attention, naive_adaptive_attention, plan_adaptive_attention
from scatterbrain.ops.adaptive.plan import exact_keys
from scatterbrain.ops.adaptive.triton.plan import run_plan
from scatterbrain.ops.adaptive.triton.tables import plan_of_tables, tables_layout
from scatterbrain.ops.clusters import landmark_attention, naive_landmark_attention
from scatterbrain.ops.clusters.triton import find_clusters, with_even_rows
from scatterbrain.ops.clusters.triton.operator import LandmarkPlan
from src.models.ops.fused_linear import FoldedLinear, Patches, fused_linear, naive_fused_linear
from src.models.ops.token_tail import FoldedTail, naive_token_tail, token_tail
from tests.helpers import OPERATORS
from tests.scatterbrain.ops.poison import poisoned_memory

# Widths around the multiples of what a load, a product or a tile takes; 40 and 72 are those of diffusion models.
WIDTHS = (1, 2, 8, 15, 16, 17, 20, 24, 32, 33, 36, 40, 48, 56, 64, 65, 72, 80, 88, 96, 104, 112, 120, 127, 128)
LAYOUTS = ("contiguous", "heads", "qkv", "padded", "offset", "columns", "one sample", "one head")
# Relative to the RMS of what is expected: twice CANCELLATION_LIMIT (16) roundings of half precision. So much may a sum
# over all keys less its window lose before the kernels recompute it. An element read or written wrongly is off by the
# size of the output.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6.4e-2}
MARGIN = 256


@dataclass(frozen=True)
class Attention:
    """One call of an attention: sizes, masks, dtype and where its inputs lie."""

    seed: int
    operator: str
    batch: int
    heads: int
    length: int
    num_keys: int
    width: int
    value_width: int
    window: int
    rows: int
    dtype: torch.dtype
    max_logit: float | None
    layouts: tuple[str, str, str, str]
    has_lengths: bool
    is_causal: bool
    gradients: bool


def draw_attention(seed: int, small: bool) -> Attention:
    """The case of a seed; `small` for the interpreter, which has no bfloat16 and takes a second for a hundred rows."""
    rng = random.Random(seed)
    dtype = rng.choice(
        [torch.float32, torch.float16] if small else [torch.float32, *[torch.bfloat16, torch.float16] * 2]
    )
    # float32 products are written out: wide tiles take minutes to compile, and `auto` does not choose them
    # and wide heads of any dtype are the slowest to compile
    widest = 48 if small else 128 if dtype != torch.float32 and rng.random() < 0.25 else 64

    def width() -> int:
        return rng.choice([x for x in WIDTHS if x <= widest]) if rng.random() < 0.6 else rng.randint(1, widest)

    def length() -> int:
        return (
            rng.randint(1, 40)
            if small
            else rng.choice([rng.randint(1, 70), rng.randint(71, 300), rng.randint(301, 800)])
        )

    narrow = width()
    num_queries = length()
    return Attention(
        seed,
        rng.choice(["local", "performer", "scatterbrain", "scatterbrain"]),
        rng.randint(1, 3),
        rng.choice([1, 1, 2, 3]),
        num_queries,
        num_queries if rng.random() < 0.5 else length(),
        narrow,
        narrow if rng.random() < 0.5 else width(),
        rng.choice([1, rng.randint(2, 16), rng.randint(17, 64), rng.randint(65, 300)][: 2 if small else 4]),
        rng.choice([rng.randint(1, 4), rng.randint(5, 16), rng.randint(17, 40)][: 2 if small else 3]),
        dtype,
        rng.choice([None, None, 2.0, 10.0, 50.0]),
        tuple(rng.choice(LAYOUTS) for _ in range(4)),
        rng.random() < 0.4,
        rng.random() < 0.25,
        rng.random() < 0.6,
    )


def place(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The values (B, H, N, E) as a view with the strides of a layout into a buffer that is nan elsewhere."""
    batch, heads, length, width = values.shape
    offset = MARGIN
    strides = [heads * length * width, length * width, width, 1]
    if layout == "heads":
        strides = [heads * length * width, width, heads * width, 1]
    elif layout == "qkv":
        strides, offset = [3 * heads * length * width, width, 3 * heads * width, 1], MARGIN + heads * width
    elif layout == "padded":
        strides = [heads * length * (width + 3), length * (width + 3), width + 3, 1]
    elif layout == "offset":
        offset = MARGIN + 1
    elif layout == "columns":
        strides = [heads * length * width, length * width, 1, length]
    elif layout == "one sample":
        strides[0] = 0
    elif layout == "one head":
        strides[:2] = [length * width, 0]
    size = offset + sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True)) + 1 + MARGIN
    buffer = torch.full((size,), float("nan"), dtype=values.dtype, device=values.device)
    view = buffer.as_strided(values.shape, strides, offset)
    view[:: max(1, batch * (strides[0] == 0)), :: max(1, heads * (strides[1] == 0))] = values[
        :: max(1, batch * (strides[0] == 0)), :: max(1, heads * (strides[1] == 0))
    ]
    return view


def excess(expected: torch.Tensor, result: torch.Tensor, dtype: torch.dtype, size: float = 0.0) -> float:
    """RMS of the error over what is allowed; infinite where the result is not finite.

    Args:
        expected: float64.
        result: of the kernel.
        dtype: of the kernel's inputs.
        size: RMS below which errors are not counted relative to `expected`, which may be zero.
    """
    if not result.isfinite().all():
        return float("inf")
    error, scale = ((x.double().square().mean().sqrt().item()) for x in (result.double() - expected, expected))
    return error / (max(scale, size, 1e-6) * TOLERANCE[dtype])


def run_attention(case: Attention, device: str) -> dict[str, float]:
    """Errors of the output and the gradients over what is allowed, by name."""
    torch.manual_seed(case.seed)
    sizes = (case.batch, case.heads)
    inputs = [
        torch.randn(*sizes, n, width, dtype=torch.float64)
        for n, width in (
            (case.length, case.width),
            (case.num_keys, case.width),
            (case.num_keys, case.value_width),
            (case.length, case.value_width),
        )
    ]
    logit = 0.25
    if case.max_logit is not None:
        largest = (inputs[0] @ inputs[1].transpose(-2, -1)).abs().max().item() * case.width**-0.5
        logit = case.max_logit / max(largest, 1e-3)
    for x in inputs[:2]:
        x *= logit**0.5
    projection = torch.randn(case.rows, case.width).to(device, case.dtype)
    placed = [place(x.to(device, case.dtype), layout) for x, layout in zip(inputs, case.layouts, strict=True)]
    exact = [torch.nan_to_num(x.double()).requires_grad_(i < 3) for i, x in enumerate(placed)]
    lengths = None
    if case.has_lengths:
        lengths = torch.randint(0, case.num_keys + 1, (case.batch,), device=device)
        lengths[0] = case.num_keys
        for x, layout in zip(placed[1:3], case.layouts[1:3], strict=True):
            if layout != "one sample":  # its rows are those of the first sample too
                hidden = torch.arange(case.num_keys, device=device) >= lengths[:, None]
                x.masked_fill_(hidden[:, None, :, None].expand_as(x), float("nan")) if layout != "one head" else x[
                    :, :1
                ].masked_fill_(hidden[:, None, :, None].expand_as(x[:, :1]), float("nan"))
    query, key, value = (x.detach().requires_grad_(case.gradients) for x in placed[:3])
    own = {"landmarks": Landmarks, "adaptive": Adaptive}
    operator = own[case.operator](case) if case.operator in own else OPERATORS[case.operator]
    options = {"is_causal": case.is_causal, "key_lengths": lengths}
    with poisoned_memory():
        out = operator(query, key, value, projection, case.window, backend="triton", **options)
        gradients = torch.autograd.grad(out, (query, key, value), placed[3]) if case.gradients else ()
    expected = operator.naive(*exact[:3], projection.double(), case.window, **options)[0]
    results = {"out": excess(expected.detach(), out.detach(), case.dtype)}
    if case.gradients:
        expected = torch.autograd.grad(expected, exact[:3], exact[3])
        # a gradient of the logits is what is left of terms of this size, and exactly nothing where one key has all
        size = exact[3].square().mean().sqrt() * exact[2].square().mean().sqrt() * case.value_width**0.5
        size = size.item() * case.width**-0.5
        for name, one, other, factor in zip(
            ("query", "key", "value"), expected, gradients, (exact[1], exact[0], None), strict=True
        ):
            floor = 0.0 if factor is None else size * factor.detach().square().mean().sqrt().item()
            results[f"gradient of {name}"] = excess(one, other, case.dtype, floor)
    return results


class Landmarks:
    """Landmark attention as the operators of `tests.helpers`; the specification gets the kernels' clusters.

    With half precision keys near the border of two clusters may be in either, so clusters have tests of their own.
    """

    def __init__(self, case: Attention) -> None:
        self.case, self.clusters = case, None

    def __call__(self, query, key, value, projection, window, is_causal, key_lengths, backend):
        """Output of the kernels, which find the clusters or, for every third case, get them."""
        num_landmarks = min(self.case.rows, key.shape[2])
        self.clusters = find_clusters(key, num_landmarks, self.case.seed % 3, key_lengths)
        options = {"num_steps": self.case.seed % 3, "assignment": self.clusters if self.case.seed % 3 == 0 else None}
        return landmark_attention(
            query, key, value, num_landmarks, window, key_lengths=key_lengths, backend=backend, **options
        )

    def naive(self, query, key, value, projection, window, is_causal, key_lengths):
        """Output and weights of the specification."""
        scale = query.shape[-1] ** -0.5
        return naive_landmark_attention(query, key, value, self.clusters, window, scale, key_lengths)


class Adaptive:
    """Adaptive attention as the operators of `tests.helpers`, with a plan of PyTorch or, for every third case, its own.

    The number of query clusters and the density follow from the seed of the case.
    """

    def __init__(self, case: Attention) -> None:
        self.case, self.plan = case, None

    def __call__(self, query, key, value, projection, window, is_causal, key_lengths, backend):
        """Output of the kernels."""
        rng = random.Random(f"adaptive {self.case.seed}")
        num_landmarks, num_queries = (min(self.case.rows, key.shape[2]), min(rng.randint(1, 48), query.shape[2]))
        density = rng.choice([1.0, rng.random(), rng.random() / 4, rng.random() / 4])
        sizes, options = (num_landmarks, num_queries, density), {"num_steps": self.case.seed % 2}
        num_exact = exact_keys(density, key.shape[2])
        own = self.case.seed % 3 == 0 and num_exact > 0
        if own:
            tensors = [with_even_rows(x.detach()) for x in (query, key, value)]
            arguments = (*tensors, key_lengths, None, None, *sizes, None, query.shape[3] ** -0.5, *options.values())
            statistics, tables = run_plan(*arguments, False)
            plan = LandmarkPlan(*tensors, key_lengths, None, num_landmarks, 0, 1.0, 0)
            shape = (plan.groups, plan.length, plan.num_keys, num_landmarks, num_queries, num_exact)
            views = tables_layout(*shape, sorts_keys=False).views(tables)
            labels = plan.statistics().views(statistics)["labels"]
            self.plan = plan_of_tables(labels, views, num_landmarks, query.shape[0])
        else:
            tensors = [x.detach() for x in (query, key, value)]
            self.plan = plan_adaptive_attention(*tensors, *sizes, key_lengths=key_lengths, **options)
        options["plan"] = None if own else self.plan
        return adaptive_attention(
            query, key, value, *sizes, window, key_lengths=key_lengths, backend=backend, **options
        )

    def naive(self, query, key, value, projection, window, is_causal, key_lengths):
        """Output and weights of the specification."""
        return naive_adaptive_attention(query, key, value, *self.plan[:3], window, query.shape[-1] ** -0.5, key_lengths)


def draw_adaptive(seed: int, small: bool) -> Attention:
    """The case of a seed, as of `draw_landmarks`."""
    return replace(draw_landmarks(seed, small), operator="adaptive")


def draw_landmarks(seed: int, small: bool) -> Attention:
    """The case of a seed; `rows` is the number of landmarks, and the window may be 0."""
    rng = random.Random(seed)
    sizes = [rng.randint(1, 4), rng.randint(5, 20), rng.randint(21, 64), rng.randint(65, 128), rng.randint(129, 300)]
    window = 0 if rng.random() < 0.3 else None
    case = draw_attention(seed, small)
    if window is None:
        window = min(case.window, 512)
    rows = rng.choice(sizes[: 3 if small else 5])
    return replace(case, operator="landmarks", rows=rows, window=window, is_causal=False)


@dataclass(frozen=True)
class Linear:
    """One call of `fused_linear`."""

    seed: int
    shape: tuple[int, ...]
    out_features: int
    patches: tuple[int, int, int] | None
    normalise: bool
    bias: bool
    gelu: bool
    residual: bool
    padding: int
    dtype: torch.dtype


def draw_linear(seed: int, small: bool) -> Linear:
    """The case of a seed; `small` for the interpreter."""
    rng = random.Random(seed)
    most = 70 if small else 800
    over_patches = rng.random() < 0.3
    shape = (rng.randint(1, 3), rng.randint(1, most), rng.randint(1, most))
    patches = None
    if over_patches:
        patches = (rng.randint(1, 7), rng.randint(1, 4), rng.randint(0, 3))
        side = (rng.randint(7, 12 if small else 40), rng.randint(7, 12 if small else 40))
        shape = (rng.randint(1, 3), *side, rng.choice([1, 3, 8, 64]))
    return Linear(
        seed,
        shape,
        rng.randint(1, most) if rng.random() < 0.6 else rng.choice([64, 128] if small else [64, 128, 192, 384, 1152]),
        patches,
        rng.random() < 0.5,
        rng.random() < 0.7,
        rng.random() < 0.4,
        rng.random() < 0.4,
        rng.choice([0, 0, 1, 3, 8]),
        rng.choice([torch.float32, torch.float16] if small else [torch.float32, torch.bfloat16, torch.float16]),
    )


def run_linear(case: Linear, device: str) -> dict[str, float]:
    """Error of the output over what is allowed."""
    torch.manual_seed(case.seed)
    patches = None if case.patches is None else Patches(*case.patches)
    in_features = case.shape[-1] * (1 if patches is None else patches.kernel**2)
    linear = nn.Linear(in_features, case.out_features, bias=case.bias)
    norm = nn.LayerNorm(in_features) if case.normalise else None
    for module in (linear, norm):
        if module is not None:
            module.to(device, case.dtype).requires_grad_(False)
    values = (torch.randn(case.shape) + 0.3).to(device, case.dtype)
    x = values
    if patches is None:
        # rows further apart than they are wide
        wide = torch.full((*case.shape[:-1], case.shape[-1] + case.padding), float("nan")).to(values)
        x = wide[..., : case.shape[-1]]
        x.copy_(values)
    folded = FoldedLinear(linear.weight, linear.bias, norm, gelu=case.gelu, patches=patches)
    residual = torch.randn(folded.output_shape(x)).to(values) if case.residual else None
    affine = {} if norm is None else {"gamma": norm.weight, "beta": norm.bias, "eps": norm.eps}
    with poisoned_memory(), torch.inference_mode():
        out = fused_linear(x, folded, residual, backend="triton")
    options = {"normalise": case.normalise, "gelu": case.gelu, "patches": patches, "residual": residual}
    expected = naive_fused_linear(values, linear.weight, linear.bias, **options, **affine)
    # a row of one element is its own mean, and what is left of it rounding
    return {"out": excess(expected, out, case.dtype, 1.0 if in_features == 1 else 0.0)}


@dataclass(frozen=True)
class Tail:
    """One call of `token_tail`."""

    seed: int
    length: int
    width: int
    hidden: int
    padding: int
    dtype: torch.dtype


def draw_tail(seed: int, small: bool) -> Tail:
    """The case of a seed; `small` for the interpreter."""
    rng = random.Random(seed)
    widest = 40 if small else 128
    return Tail(
        seed,
        rng.randint(1, 60 if small else 3000),
        rng.randint(2, widest),
        rng.randint(1, widest),
        rng.choice([0, 1, 3, 8]),
        rng.choice([torch.float32, torch.float16] if small else [torch.float32, torch.bfloat16, torch.float16]),
    )


def run_tail(case: Tail, device: str) -> dict[str, float]:
    """Error of the output over what is allowed."""
    torch.manual_seed(case.seed)
    projection, first = nn.Linear(case.width, case.width), nn.Linear(case.width, case.hidden)
    second, norm = nn.Linear(case.hidden, case.width), nn.LayerNorm(case.width)
    for layer in (projection, norm, first, second):
        layer.to(device, case.dtype).requires_grad_(False)
    placed = []
    for _ in range(2):
        wide = torch.full((2, case.length, case.width + case.padding), float("nan"), device=device, dtype=case.dtype)
        view = wide[..., : case.width]
        view.copy_(torch.randn(view.shape))
        placed.append(view)
    with poisoned_memory(), torch.inference_mode():
        out = token_tail(*placed, FoldedTail(projection, norm, first, second), "triton")
    linears = [(layer.weight, layer.bias) for layer in (projection, first, second)]
    expected = naive_token_tail(*placed, linears[0], (norm.weight, norm.bias, norm.eps), *linears[1:])
    return {"out": excess(expected, out, case.dtype)}


KINDS = {
    "attention": (draw_attention, run_attention),
    "landmarks": (draw_landmarks, run_attention),
    "adaptive": (draw_adaptive, run_attention),
    "linear": (draw_linear, run_linear),
    "tail": (draw_tail, run_tail),
}


def describe(case: Attention | Linear | Tail) -> str:
    """The case's sizes in one line."""
    return f"{type(case).__name__}({', '.join(f'{x.name}={getattr(case, x.name)}' for x in fields(case))})"


def failures(kind: str, seeds: range, device: str, small: bool) -> Iterator[str]:
    """What went wrong in the cases of these seeds, a line each."""
    draw, run = KINDS[kind]
    for seed in seeds:
        case = draw(seed, small)
        wrong = {name: error for name, error in run(case, device).items() if not error <= 1.0}
        if wrong:
            yield f"{describe(case)}: " + ", ".join(
                f"{name} {error:.3g} times the tolerance" for name, error in wrong.items()
            )


def main() -> None:
    """Run cases of consecutive seeds, print those that fail, and exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, default="attention")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start, count = time.perf_counter(), 0
    for line in failures(
        arguments.kind, range(arguments.first, arguments.first + arguments.cases), device, device == "cpu"
    ):
        print(line, flush=True)
        count += 1
    seconds = time.perf_counter() - start
    print(f"{arguments.kind}: {count} of {arguments.cases} cases failed on {device}, {seconds:.0f} s")
    raise SystemExit(count > 0)


if __name__ == "__main__":
    main()
