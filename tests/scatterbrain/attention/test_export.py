"""Export, compilation and copies of every attention, against the table in docs/export.md."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch.export import Dim, export

import scatterbrain
from scatterbrain.attention import option_parameters
from scatterbrain.ops.sparse import tiled

TABLE = Path(__file__).parents[3] / "docs" / "export.md"
# a square, for the two-dimensional windows
LENGTH, HEADS, WIDTH = 36, 2, 8


def read_table() -> dict[str, dict[str, bool]]:
    """Whether each use works with each attention: {attention: {use: works}}."""
    lines = [line.strip("|\n ").split("|") for line in TABLE.read_text().splitlines() if line.startswith("|")]
    uses = [cell.strip() for cell in lines[0][1:]]
    cells = {}
    for names, *row in lines[2:]:
        assert len(row) == len(uses)
        assert {cell.strip() for cell in row} <= {"yes", "no"}
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in cells
            cells[name] = dict(zip(uses, (cell.strip() == "yes" for cell in row), strict=True))
    return cells


WORKS = read_table()
NAMES = list(scatterbrain.ATTENTIONS)
# export takes seconds: one attention of each class, of the paired clusters the one with exact keys
OF_EACH_CLASS = list({scatterbrain.ATTENTIONS[name].module: name for name in NAMES}.values())
# one for each way to depend on the length
OF_EACH_LENGTH_RULE = ["full", "performer", "local", "smyrf", "bs-longformer", "local2d"]
# what export raises where the length cannot be dynamic; PyTorch 2.6 fails while it words its suggestion
NOT_EVERY_LENGTH = "inconsistent min|length"
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


def create(name: str) -> torch.nn.Module:
    options = {"num_steps": 1} if "num_steps" in option_parameters(scatterbrain.ATTENTIONS[name].module) else {}
    return scatterbrain.create_attention(name, LENGTH, dim_heads=WIDTH, memory_fraction=1 / 4, **options).eval()


def inputs(batch: int, length: int = LENGTH, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, length, HEADS, WIDTH, generator=generator) for _ in range(3))


def assert_same(call, name: str, *arguments: torch.Tensor) -> None:
    """The recorded program gives what a fresh module gives."""
    out = call(*arguments)
    out = out[0] if isinstance(out, tuple | list) else out
    torch.testing.assert_close(out, create(name)(*arguments)[0], rtol=1e-4, atol=1e-5)


class Output(torch.nn.Module):
    """The output of an attention without its weights."""

    def __init__(self, attention: torch.nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self.attention(query, key, value)[0]


def export_batch(name, _):
    shapes = ({0: Dim("batch", max=64)},) * 4
    program = export(create(name), (*inputs(2), torch.tensor([LENGTH, 20])), dynamic_shapes=shapes).module()
    assert_same(program, name, *inputs(2, seed=1), torch.tensor([30, 7]))
    assert_same(program, name, *inputs(1, seed=1), torch.tensor([11]))
    assert_same(program, name, *inputs(5, seed=1), torch.tensor([LENGTH, 20, 1, 35, 0]))


def export_length(name, _):
    shapes = ({1: Dim("length", min=16, max=128)},) * 3
    program = export(create(name), inputs(2), dynamic_shapes=shapes).module()
    for length in (16, 49, 100):
        assert_same(program, name, *inputs(2, length, seed=1))


def compile_fullgraph(name, _):
    torch._dynamo.reset()
    call = torch.compile(create(name), backend="aot_eager", fullgraph=True)
    assert_same(call, name, *inputs(2))


def trace(name, _):
    call = torch.jit.trace(Output(create(name)), inputs(2), check_trace=False)
    assert_same(call, name, *inputs(2, seed=1))
    assert_same(call, name, *inputs(5, seed=1))


def onnx(name, folder, batch=2, attention=None):
    if VERSION < (2, 9):
        pytest.skip("the ONNX exporter needs PyTorch 2.9, see docs/installation.md")
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    logging.disable(logging.WARNING)
    path = folder / "attention.onnx"
    module = Output(create(name) if attention is None else attention)
    shapes = ({0: Dim("batch", max=64)},) * 3
    torch.onnx.export(module, inputs(batch), path, dynamic_shapes=shapes, dynamo=True, verbose=False)
    logging.disable(logging.NOTSET)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (batch, 1, 5):
        arguments = inputs(size, seed=1)
        feed = {each.name: x.numpy() for each, x in zip(session.get_inputs(), arguments, strict=True)}
        out = torch.from_numpy(session.run(None, feed)[0])
        torch.testing.assert_close(out, module(*arguments), rtol=1e-4, atol=1e-5)


def copies(name, _):
    module = create(name)
    module(*inputs(2))  # fills what is cached
    assert_same(copy.deepcopy(module), name, *inputs(2))
    assert_same(pickle.loads(pickle.dumps(module)), name, *inputs(2))


def on_meta(name, _):
    with torch.device("meta"):
        fresh = create(name)
    for module in (fresh, create(name).to("meta")):
        out, _ = module(*(x.to("meta") for x in inputs(2)))
        assert out.is_meta
        assert out.shape == (2, LENGTH, HEADS, WIDTH)
        module = module.to_empty(device="cpu")
        module.load_state_dict(create(name).state_dict())
        assert_same(module, name, *inputs(2))


CASES = {
    "export, dynamic batch": (export_batch, OF_EACH_CLASS),
    "export, dynamic length": (export_length, OF_EACH_LENGTH_RULE),
    "torch.compile": (compile_fullgraph, OF_EACH_CLASS),
    "jit.trace": (trace, NAMES),
    "ONNX": (onnx, OF_EACH_CLASS),
    "copy": (copies, NAMES),
    "meta": (on_meta, NAMES),
}


def test_the_table_names_every_attention_and_use():
    assert sorted(WORKS) == sorted(NAMES)
    assert all(list(row) == list(CASES) for row in WORKS.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("use", "name"), [(use, name) for use, (_, names) in CASES.items() for name in names])
def test_what_the_table_says(use, name, tmp_path):
    call = CASES[use][0]
    if WORKS[name][use]:
        call(name, tmp_path)
    else:
        message = "Use torch.export" if use == "jit.trace" else NOT_EVERY_LENGTH
        with pytest.raises(Exception, match=message):
            call(name, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_a_window_of_one_key(tmp_path):
    onnx("sblocal", tmp_path, attention=scatterbrain.create_attention("sblocal", LENGTH, WIDTH, local_context=1).eval())


@pytest.mark.filterwarnings("ignore")
def test_clusters_take_lengths_that_are_multiples_of_their_number():
    module = create("cluster")
    shapes = ({1: module.num_landmarks * Dim("groups", min=2, max=14)},) * 3
    program = export(module, inputs(2), dynamic_shapes=shapes).module()
    for groups in (2, 5, 10):
        assert_same(program, "cluster", *inputs(2, groups * module.num_landmarks, seed=1))
    with pytest.raises(Exception, match=r"% 9 == 0|of the form 9\*"):  # PyTorch 2.6 words it the second way
        program(*inputs(2, 50))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sbcluster", "pairedcluster"])
def test_clusters_do_not_take_every_length(name):
    with pytest.raises((AssertionError, torch._dynamo.exc.UserError), match=NOT_EVERY_LENGTH):
        export(create(name), inputs(2), dynamic_shapes=({1: Dim("length", min=16, max=128)},) * 3)


def test_a_compiled_layout_follows_the_length():
    torch._dynamo.reset()
    call = torch.compile(create("bs-longformer"), backend="aot_eager", fullgraph=True)
    for length in (36, 49, 64, 36):
        assert_same(call, "bs-longformer", *inputs(2, length))


@pytest.mark.parametrize("use", ["compile", "export"])
def test_queries_whose_subtraction_cancels_are_recomputed_in_a_graph(use, monkeypatch):
    """With every query recomputed the output is the same, and so are the gradients."""
    monkeypatch.setattr(tiled, "CANCELLATION_LIMIT", 0.0)
    torch._dynamo.reset()
    module, lengths = create("sbbs-longformer"), torch.tensor([LENGTH, 20])
    if use == "export":
        call = export(module, (*inputs(2), lengths)).module()
    else:
        call = torch.compile(module, backend="aot_eager", fullgraph=True)
    results = []
    for each in (module, call):
        arguments = [x.requires_grad_(use == "compile") for x in inputs(2, seed=1)]
        out = each(*arguments, lengths)[0]
        results.append(
            [out.detach(), *(torch.autograd.grad(out.square().sum(), arguments) if use == "compile" else [])]
        )
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
