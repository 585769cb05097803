"""Fast implementations against the specifications: outputs and all gradients, over shapes, windows and masks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.helpers import OPERATORS, Operator, assert_close, draw_inputs, operators_and_windows

# float64 against float64: sums of up to 300 terms, exponentials of logits up to 10
DOUBLE = 1e-12
# float32 against float64: rounding 6e-8 of logits up to 10, once more for the gradients
SINGLE_OUTPUT = 2e-6
SINGLE_GRADIENT = 1e-5


@dataclass(frozen=True)
class Case:
    """Shapes, window and masks of one comparison."""

    length: int = 50
    num_keys: int = 50
    width: int = 16
    value_width: int = 16
    window: int = 7
    rows: int = 5
    is_causal: bool = False
    lengths: tuple[int, int] | None = None
    scale: float | None = None

    def __str__(self) -> str:
        name = f"T{self.length}-S{self.num_keys}-E{self.width}-D{self.value_width}-W{self.window}-R{self.rows}"
        if self.lengths is not None:
            name += f"-lengths{self.lengths[0]},{self.lengths[1]}"
        return name + ("-causal" if self.is_causal else "") + (f"-scale{self.scale}" if self.scale else "")

    def options(self) -> dict:
        lengths = None if self.lengths is None else torch.tensor(self.lengths)
        return {"is_causal": self.is_causal, "key_lengths": lengths, "scale": self.scale}


SHAPES = [
    Case(),
    Case(1, 1, 1, 1, window=1, rows=1),
    Case(37, 37, 5, 3, window=7, rows=3),
    Case(129, 129, 13, 17, window=5, rows=9),
    Case(50, 97, window=8),
    Case(97, 50, window=8),
    Case(200, 30, window=9),
    Case(30, 200, window=9),
    Case(300, 3, window=4),
    Case(3, 300, window=4),
    Case(64, 64, window=6),
    Case(65, 128, window=6),
    Case(40, 40, scale=0.3),
    Case(40, 40, scale=1.5),
]
WINDOWS = [Case(150, 150, width=8, window=window) for window in (1, 2, 3, 16, 17, 18, 49, 64, 65, 66)] + [
    # several blocks on either side, and windows that hang over the ends
    Case(300, 300, width=8, window=window)
    for window in (98, 129, 130, 131, 200, 299, 300, 301, 602, 1000)
]
MASKS = [
    Case(150, 150, width=8, window=window, is_causal=is_causal, lengths=lengths)
    for window in (1, 2, 7, 49, 131, 400)
    for is_causal, lengths in (
        (True, None),
        (False, (150, 0)),
        (False, (1, 149)),
        (True, (0, 70)),
        (True, (150, 33)),
    )
]
COMBINED = [
    Case(101, 37, 5, 3, window=12, rows=3, is_causal=True, lengths=(0, 37)),
    Case(101, 37, 5, 3, window=90, rows=3, is_causal=True, lengths=(36, 1)),
    Case(37, 210, 5, 3, window=11, rows=3, is_causal=True, lengths=(210, 5)),
    Case(37, 210, 5, 3, window=150, rows=3, is_causal=False, lengths=(0, 209)),
    Case(210, 37, 5, 3, window=150, rows=3, is_causal=False, lengths=(37, 2), scale=0.9),
]


def differentiate(function, tensors, projection, cotangent) -> dict[str, torch.Tensor]:
    """Output and gradients by name; a gradient that does not exist is left out."""
    leaves = dict(zip(("query", "key", "value"), tensors, strict=True)) | {"projection": projection}
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in leaves.items()}
    out = function(*leaves.values())
    out.backward(cotangent.to(out.dtype))
    grads = {f"grad of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"out": out.detach()} | grads


def compare(operator: Operator, case: Case) -> None:
    *tensors, projection = draw_inputs(
        2, 2, case.length, case.num_keys, case.width, case.value_width, case.rows, torch.float32
    )
    cotangent = torch.randn(2, 2, case.length, case.value_width)

    def naive(*leaves):
        return operator.naive(*leaves, case.window, **case.options())[0]

    def fast(*leaves):
        return operator(*leaves, case.window, **case.options())

    expected = differentiate(naive, [x.double() for x in tensors], projection.double(), cotangent)
    assert ("grad of projection" in expected) == ("projection" in operator.takes)
    for dtype in (torch.float64, torch.float32):
        result = differentiate(fast, [x.to(dtype) for x in tensors], projection.to(dtype), cotangent)
        assert result.keys() == expected.keys()
        for name, reference in expected.items():
            assert result[name].dtype == dtype
            single = SINGLE_OUTPUT if name == "out" else SINGLE_GRADIENT
            assert_close(f"{name} ({dtype})", reference, result[name], DOUBLE if dtype == torch.float64 else single)


@pytest.mark.parametrize("case", SHAPES + MASKS + COMBINED, ids=str)
@pytest.mark.parametrize("name", ["local", "scatterbrain"])
def test_windowed(name, case):
    compare(OPERATORS[name], case)


@pytest.mark.parametrize("case", WINDOWS, ids=str)
@pytest.mark.parametrize("name", ["local", "scatterbrain"])
def test_window_sizes(name, case):
    compare(OPERATORS[name], case)


@pytest.mark.parametrize("case", SHAPES + [case for case in MASKS if case.window == 7] + COMBINED, ids=str)
@pytest.mark.parametrize("name", ["full", "performer"])
def test_without_window(name, case):
    compare(OPERATORS[name], case)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [3, 40])
def test_wide_heads_take_a_maximum_for_each_key(window, is_causal):
    # above a width of 128, one maximum over all keys is not safe
    compare(OPERATORS["scatterbrain"], Case(150, 170, width=144, window=window, is_causal=is_causal, lengths=(170, 90)))


@pytest.mark.parametrize("eps", [1e-8, 0.3])
def test_eps_of_performer(eps):
    operator = OPERATORS["performer"]
    tensors = draw_inputs(length=37, num_keys=20, max_logit=20)
    lengths = torch.tensor([20, 0])
    expected, _ = operator.naive(*tensors, 0, eps=eps, key_lengths=lengths)
    assert_close("out", expected, operator(*tensors, 0, eps=eps, key_lengths=lengths), DOUBLE)
    without = operator(*tensors, 0, key_lengths=lengths)
    assert (without - expected).abs().max() > 1e-6


@pytest.mark.parametrize("name", OPERATORS)
def test_auto_is_torch_and_naive_is_the_specification(name):
    operator = OPERATORS[name]
    tensors = draw_inputs(length=30, dtype=torch.float32)
    assert torch.equal(operator(*tensors, 5), operator(*tensors, 5, backend="torch"))
    naive = operator(*tensors, 5, backend="naive")
    assert naive.dtype == torch.float32
    assert torch.equal(naive, operator.naive(*tensors, 5)[0].float())


@pytest.mark.parametrize(("name", "window"), operators_and_windows(1, 4, 20))
@pytest.mark.parametrize(("is_causal", "lengths"), [(False, None), (True, None), (False, (0, 5)), (True, (6, 2))])
@pytest.mark.parametrize(("length", "num_keys"), [(5, 7), (7, 5)])
def test_gradcheck(name, window, is_causal, lengths, length, num_keys):
    operator = OPERATORS[name]
    lengths = None if lengths is None else torch.tensor(lengths).clamp_max(num_keys)
    tensors = [x.requires_grad_() for x in draw_inputs(2, 1, length, num_keys, 3, 2, rows=2)]
    if "projection" not in operator.takes:
        tensors[3].requires_grad_(False)
    assert torch.autograd.gradcheck(
        lambda *leaves: operator(*leaves, window, is_causal=is_causal, key_lengths=lengths), tensors
    )
