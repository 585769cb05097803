"""Random calls of the kernels: small ones in Triton's interpreter, many at real sizes on a GPU. See `fuzz.py`."""

from __future__ import annotations

import pytest

from scatterbrain.ops.common.backends import is_interpreted

triton = pytest.importorskip("triton")

from tests.scatterbrain.ops.fuzz import failures  # noqa: E402 - imports triton

needs_interpreter = pytest.mark.skipif(
    not is_interpreted() or triton.__version__.startswith("3.2."),
    reason="the kernels are compiled for the GPU here, or Triton's interpreter is too old for them",
)


@needs_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of padding that is masked afterwards
@pytest.mark.parametrize(
    ("kind", "seeds"),
    [
        ("attention", range(15)),
        ("landmarks", range(6)),
        ("adaptive", range(3)),
        ("linear", range(30)),
        ("tail", range(15)),
    ],
)
def test_small_cases(kind, seeds):
    assert not list(failures(kind, seeds, "cpu", small=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["attention", "landmarks", "adaptive"])
@pytest.mark.parametrize("first", range(0, 320, 10))
def test_attention(kind, first):
    assert not list(failures(kind, range(first, first + 10), "cuda", small=False))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["linear", "tail"])
@pytest.mark.parametrize("first", range(0, 80, 20))
def test_inference_kernels(kind, first):
    assert not list(failures(kind, range(first, first + 20), "cuda", small=False))
