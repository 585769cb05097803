"""`replace_sdpa`: what it routes is the method's output, and what the method cannot take is PyTorch's, unchanged."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import scatterbrain
from scatterbrain.attention import ATTENTIONS
from scatterbrain.errors import UserError
from scatterbrain.integrations.router import Router, layer_routers

SDPA = F.scaled_dot_product_attention
LENGTH = 64
# docs/attentions.md, "Masks"
CAUSAL = {
    *("full", "local", "performer", "linear-attention-performer", "sblocal", "combination-local-performer"),
    *("bs-bigbird", "bs-longformer", "bs-openai", "sbcluster"),
}
MASKED = CAUSAL | {
    *("local2d", "sblocal2d", "sbbs-bigbird", "sbbs-longformer", "sbbs-openai"),
    *("cluster", "pairedcluster", "sbpairedcluster"),
}


def tensors(length: int = LENGTH, heads: int = 2, dtype: torch.dtype = torch.float32, width: int = 16):
    torch.manual_seed(0)
    return torch.randn(3, 2, heads, length, width, dtype=dtype).unbind()


def right_padding(length: int = LENGTH) -> torch.Tensor:
    return (torch.arange(length) < torch.tensor([length, length - 20])[:, None])[:, None, None, :]


def both(method: str, *args, min_tokens: int = 16, options=None, **kwargs):
    """Output under the replacement, PyTorch's, and the report."""
    expected = SDPA(*args, **kwargs)
    with scatterbrain.replace_sdpa(method, min_tokens, **(options or {})) as replacement:
        out = F.scaled_dot_product_attention(*args, **kwargs)
    return out, expected, replacement.report()


# What is routed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(ATTENTIONS))
def test_a_routed_call_is_the_methods_output(method):
    query, key, value = tensors()
    module = scatterbrain.create_attention(method, LENGTH, dim_heads=16, memory_fraction=1 / 4, softmax_temp=0.3)
    expected = module(*(x.transpose(1, 2) for x in (query, key, value)))[0].transpose(1, 2)
    out, full, report = both(method, query, key, value, scale=0.3, options={"memory_fraction": 1 / 4})
    assert report == {"routed": 1}
    torch.testing.assert_close(out, expected)
    if method != "full":
        assert not torch.allclose(out, full, atol=1e-3)


CALLS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "causal": {"is_causal": True},
    "right padding": {"attn_mask": right_padding()},
    "left padding": {"attn_mask": right_padding().flip(-1)},
    "expanded padding": {"attn_mask": right_padding().expand(2, 2, LENGTH, LENGTH)},
    "one mask for the batch": {"attn_mask": right_padding()[1:]},
    "additive padding": {"attn_mask": torch.zeros(2, 1, 1, LENGTH).masked_fill(~right_padding(), -math.inf)},
}
PASSED_ON = {
    "mask (T, S)": {"attn_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()},
    "mask (B, 1, T, S)": {"attn_mask": right_padding() & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()},
    "mask of one head": {"attn_mask": torch.cat([right_padding(), right_padding().flip(-1)], 1)},
    "bias of keys": {"attn_mask": torch.linspace(-1, 1, LENGTH).expand(2, 1, 1, LENGTH)},
    "bias": {"attn_mask": torch.linspace(-1, 1, LENGTH * LENGTH).reshape(LENGTH, LENGTH)},
}


@pytest.mark.parametrize("name", CALLS)
def test_full_attention_is_that_of_pytorch(name):
    out, expected, report = both("full", *tensors(), **CALLS[name])
    assert report == {"routed": 1}
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("method", ["local", "sblocal", "sbcluster", "smyrf"])
def test_a_mask_is_kept_by_every_method(method, name):
    """Hidden keys have no influence: the method sees the mask, or PyTorch computes the call."""
    query, key, value = tensors()
    kwargs = CALLS[name]
    visible = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
    if "attn_mask" in kwargs:
        mask = kwargs["attn_mask"]
        visible = (mask if mask.dtype == torch.bool else mask == 0)[:, :1, :1].expand(2, 1, 1, LENGTH)
    hidden = ~visible.transpose(2, 3)
    changed = [x + 5 * torch.randn_like(x) * hidden for x in (key, value)]
    out, expected, report = both(method, query, key, value, **kwargs)
    again, *_ = both(method, query, *changed, **kwargs)
    torch.testing.assert_close(out, again)
    if "routed" not in report:
        assert torch.equal(out, expected)


@pytest.mark.parametrize("name", PASSED_ON)
@pytest.mark.parametrize("method", ["full", "local", "sbcluster"])
def test_other_masks_are_pytorchs(method, name):
    out, expected, report = both(method, *tensors(), **PASSED_ON[name])
    assert "routed" not in report
    assert sum(report.values()) == 1
    assert torch.equal(out, expected)


def test_a_square_mask_of_as_many_samples_as_queries_is_no_padding():
    """Two dimensions are (T, S) for PyTorch, also where they could be (B, S)."""
    query, key, value = torch.randn(3, 16, 1, 16, 8).unbind()
    mask = torch.rand(16, 16) > 0.3
    mask[:, 0] = True
    out, expected, report = both("full", query, key, value, attn_mask=mask)
    assert report == {"attn_mask that differs by query or head": 1}
    assert torch.equal(out, expected)


@pytest.mark.parametrize("method", sorted(ATTENTIONS))
def test_methods_that_take_no_mask_or_order_pass_it_on(method):
    out, expected, report = both(method, *tensors(), is_causal=True)
    assert ("routed" in report) == (method in CAUSAL)
    assert "routed" in report or torch.equal(out, expected)
    out, expected, report = both(method, *tensors(), attn_mask=right_padding())
    assert ("routed" in report) == (method in MASKED)
    assert "routed" in report or torch.equal(out, expected)
    *_, report = both(method, *tensors(), attn_mask=torch.ones(2, 1, 1, LENGTH, dtype=torch.bool))
    assert report == {"routed": 1}


def test_a_causal_call_of_an_option_that_cannot_be_causal_is_passed_on():
    options = {"centre": "both", "balance": True}
    out, expected, report = both("sblocal", *tensors(), is_causal=True, options=options)
    assert list(report) == ["causal, and sblocal is not"]
    assert torch.equal(out, expected)


def test_what_is_passed_on_and_why():
    query, key, value = tensors()
    calls = [
        ((query[:, :, :8], key[:, :, :8], value[:, :, :8]), {}, "fewer than 16 tokens"),
        ((query[:, :, :1], key, value), {}, "another number of queries than of keys (cross-attention, or a cache)"),
        ((query[:, :, :40], key, value), {"is_causal": True}, "another number of queries than of keys"),
        ((query, key[:1], value[:1]), {}, "shapes that broadcast, are empty or do not fit"),
        ((query[0], key[0], value[0]), {}, "not floating-point tensors (B, H, length, width) of one device"),
        ((query, key, value), {"dropout_p": 0.5}, "dropout"),
        ((query, key, value), {"scale": -1.0}, "scale that is no positive number"),
        (
            (query, key, value),
            {"attn_mask": torch.zeros(2, 1, 1, LENGTH, requires_grad=True)},
            "attn_mask with a gradient",
        ),
    ]
    for args, kwargs, reason in calls:
        torch.manual_seed(1)
        expected = SDPA(*args, **kwargs)
        with scatterbrain.replace_sdpa("full", 16) as replacement:
            torch.manual_seed(1)
            out = F.scaled_dot_product_attention(*args, **kwargs)
        (found,) = replacement.report()
        assert found.startswith(reason)
        assert torch.equal(out, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_and_recordings_are_passed_on():
    query, key, value = torch.randn(3, 3, 1, 2, LENGTH, 16).unbind()
    expected = SDPA(query, key, value)
    with scatterbrain.replace_sdpa("sblocal", 16) as replacement:
        out = torch.vmap(F.scaled_dot_product_attention)(query, key, value)
        torch.func.grad(lambda x: F.scaled_dot_product_attention(x, key[0], value[0]).sum())(query[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it is deprecated
            torch.jit.trace(lambda x: F.scaled_dot_product_attention(x, x, x), query[0], check_trace=False)
        assert replacement.report() == {"torch.jit.trace or a transform of torch.func": 3}
        torch.export.export(Layer(), (torch.randn(1, LENGTH, 32),), strict=False)  # the default of newer versions
    torch.testing.assert_close(out, expected)
    assert "routed" not in replacement.report()


def test_symbolic_traces_are_passed_on():
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, LENGTH, 16)
    with scatterbrain.replace_sdpa("sblocal", 16) as replacement:
        traced = torch.fx.symbolic_trace(Model())
    assert replacement.report() == {"no tensors (torch.fx.symbolic_trace)": 1}
    assert torch.equal(traced(x), SDPA(x, x, x))


def test_what_the_method_refuses_is_passed_on():
    out, expected, report = both("local2d", *tensors(length=60))
    (reason,) = report
    assert reason.startswith("local2d: 60 tokens are no image")
    assert torch.equal(out, expected)


def test_errors_of_pytorch_remain():
    query, key, value = tensors()

    def outcome(query, **options):
        try:
            return F.scaled_dot_product_attention(query, key, value, **options)
        except RuntimeError as error:
            return error

    # older versions of PyTorch compute the first of these
    for arguments in ({"query": query, "attn_mask": right_padding(), "is_causal": True}, {"query": query.double()}):
        expected = outcome(**arguments)
        with scatterbrain.replace_sdpa("full", 16):
            out = outcome(**arguments)
        if isinstance(expected, RuntimeError):
            assert isinstance(out, RuntimeError)
            assert str(out) == str(expected)
        else:
            assert torch.equal(out, expected)
    assert isinstance(expected, RuntimeError)


@pytest.mark.parametrize("method", ["full", "sblocal", "sbcluster"])
def test_grouped_queries(method):
    query, key, value = tensors(heads=4)
    key, value = key[:, :2], value[:, :2]
    out, expected, report = both(method, query, key, value, enable_gqa=True)
    assert report == {"routed": 1}
    repeated, *_ = both(method, query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))
    torch.testing.assert_close(out, repeated)
    if method == "full":
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["full", "sblocal", "sbcluster"])
def test_dtypes(method, dtype):
    out, expected, report = both(method, *tensors(dtype=dtype))
    assert report == {"routed": 1}
    assert out.dtype == expected.dtype


@pytest.mark.parametrize("method", ["full", "sblocal", "sbcluster"])
def test_autocast(method):
    query, key, value = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        out, expected, report = both(method, query, key.bfloat16(), value)
        assert torch.is_autocast_enabled("cpu")
    assert report == {"routed": 1}
    assert out.dtype == expected.dtype == torch.bfloat16
    if method == "full":
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("method", ["full", "performer", "sbcluster"])
def test_gradients_after_a_call_in_inference_mode(method):
    query, key, value = (x.requires_grad_() for x in tensors())
    with scatterbrain.replace_sdpa(method, 16) as replacement:
        for inference in (True, False):
            with torch.inference_mode(inference):
                out = F.scaled_dot_product_attention(query, key, value)
    out.square().sum().backward()
    (module,) = replacement.router._modules.values()
    assert not any(buffer.is_inference() for buffer in module.buffers())
    assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in (query, key, value))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("method", ["full", "smyrf"])
def test_values_of_a_mask_on_an_accelerator_are_not_read(method, name):
    """Reading them would make the program wait for the device; the meta device has none to read."""
    query, key, value = (x.to("meta") for x in tensors())
    kwargs = dict(CALLS[name])
    if "attn_mask" in kwargs:
        mask = kwargs["attn_mask"]
        kwargs["attn_mask"] = mask[:, :1, :1].to("meta").expand(mask.shape)
    router = Router(method, 16)
    reason = router._reason(query, key, value, 0.0, kwargs.get("is_causal", False), None, False)
    assert (reason is None) == (name != "causal" or method == "full")
    if "attn_mask" in kwargs:
        mask, reason = router._key_mask(kwargs["attn_mask"], query, key, False)
        assert (mask is None, reason) == ((True, "additive attn_mask") if name.startswith("add") else (False, None))
        out = router.attend(query, key, value, **kwargs, pass_on=lambda: None)
        assert (out is None) == (method == "smyrf" or name.startswith("add"))


# Models -------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        query, key, value = self.qkv(x).view(*x.shape[:-1], 3, 2, 16).permute(2, 0, 3, 1, 4)
        return x + self.proj(F.scaled_dot_product_attention(query, key, value, **kwargs).transpose(1, 2).flatten(2))


def network() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(Layer(), nn.GELU(), Layer()).eval(), torch.randn(2, LENGTH, 32)


def test_every_caller_has_random_parts_of_its_own_and_keeps_them():
    model, x = network()
    with scatterbrain.replace_sdpa("performer", 16) as replacement:
        out = model(x)
        assert torch.equal(model(x), out)
    with scatterbrain.replace_sdpa("performer", 16):
        assert torch.equal(model(x), out)
    with scatterbrain.replace_sdpa("performer", 16, seed=5):
        assert not torch.allclose(model(x), out, atol=1e-4)
    seeds = {name[-1] for name in replacement.router._modules}
    assert seeds == {0, 1}
    projections = [module.projection_matrix for module in replacement.router._modules.values()]
    assert not torch.equal(*projections)
    del model
    gc.collect()
    assert not len(replacement._modules)


def test_lines_of_code_are_callers_outside_modules():
    query, key, value = tensors()
    with scatterbrain.replace_sdpa("performer", 16):
        first, again = (F.scaled_dot_product_attention(query, key, value) for _ in range(2))
        other = F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_random_state_of_the_program_is_untouched():
    model, x = network()
    state = torch.get_rng_state()
    with scatterbrain.replace_sdpa("sblocal", 16):
        model(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_remains_after_the_context_or_an_exception():
    model, x = network()
    expected = model(x)
    replacement = scatterbrain.replace_sdpa("local", 16)
    with replacement:
        assert not torch.allclose(model(x), expected, atol=1e-4)
    assert torch.equal(model(x), expected)
    assert torch.nn.functional.scaled_dot_product_attention is SDPA
    with pytest.raises(TypeError), replacement:
        model(x, wrong=1)
    assert torch.equal(model(x), expected)
    assert replacement.report() == {"routed": 2}


def test_contexts_nest():
    """The inner one gets the call, and what it computes does not reach the outer one."""
    query, key, value = tensors()
    with scatterbrain.replace_sdpa("local", 16) as outer, scatterbrain.replace_sdpa("full", 16) as inner:
        out = F.scaled_dot_product_attention(query, key, value)
    assert (outer.report(), inner.report()) == ({}, {"routed": 1})
    torch.testing.assert_close(out, SDPA(query, key, value))


def test_threads():
    """A context holds for its thread, and several threads may use one."""
    model, x = network()
    expected = model(x)
    replacement = scatterbrain.replace_sdpa("performer", 16)
    with replacement:
        approximate = model(x)
    results: dict[int, torch.Tensor] = {}

    def inside(which: int) -> None:
        with replacement:
            results[which] = [model(x) for _ in range(5)][-1]

    def outside() -> None:
        results[-1] = model(x)

    with replacement:
        threads = [threading.Thread(target=inside, args=(i,)) for i in range(4)] + [threading.Thread(target=outside)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(results.pop(-1), expected)
    assert len(results) == 4
    assert all(torch.equal(result, approximate) for result in results.values())
    assert replacement.report() == {"routed": 2 * (1 + 4 * 5)}


def test_a_copy_of_the_model_inside_the_context():
    model, x = network()
    with scatterbrain.replace_sdpa("sbcluster", 16):
        assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert set(model.state_dict()) == set(network()[0].state_dict())


@pytest.mark.parametrize("call", ["Tensor.backward", "autograd.backward", "autograd.grad"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_inside_the_context(reentrant, call):
    """Layers are computed again with the method, and the same random parts."""
    if reentrant and call == "autograd.grad":
        pytest.skip("PyTorch does not allow it")
    model, x = network()
    x.requires_grad_()
    gradients = []
    for checkpoint in (True, False):
        model.zero_grad()
        with scatterbrain.replace_sdpa("performer", 16) as replacement:
            out = x
            for layer in model:
                if checkpoint:
                    out = torch.utils.checkpoint.checkpoint(layer, out, use_reentrant=reentrant)
                else:
                    out = layer(out)
            parameters, loss = list(model.parameters()), out.square().sum()
            if call == "Tensor.backward":
                loss.backward()
            elif call == "autograd.backward":
                torch.autograd.backward(loss)
            else:
                for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    parameter.grad = gradient
        assert replacement.report() == {"routed": 4 if checkpoint else 2}
        gradients.append([parameter.grad.clone() for parameter in parameters])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("method", ["full", "sblocal"])
def test_compiled_models(method):
    model, x = network()
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with scatterbrain.replace_sdpa(method, 16) as replacement:
        torch.testing.assert_close(compiled(x), model(x))
        assert replacement.report() == {"routed": 4}
    torch.testing.assert_close(compiled(x), expected)  # compiled inside, called outside
    with scatterbrain.replace_sdpa(method, 16) as replacement:
        compiled(x)
    assert replacement.report() == {"routed": 2}


def test_compiling_without_graph_breaks_is_an_error():
    model, x = network()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with scatterbrain.replace_sdpa("full", 16), pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(x)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention(need_weights):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(32, 2, batch_first=True).eval()
    x = torch.randn(2, LENGTH, 32)
    expected, _ = layer(x, x, x, need_weights=need_weights)
    with scatterbrain.replace_sdpa("full", 16) as replacement:
        out, _ = layer(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(out, expected)
    assert list(replacement.report()) == ["nn.MultiheadAttention with need_weights=True" if need_weights else "routed"]
    with scatterbrain.replace_sdpa("local", 16):
        out, _ = layer(x, x, x, need_weights=need_weights)
    assert torch.allclose(out, expected, atol=1e-5) == need_weights


def test_encoder_layers_of_pytorch_with_padding():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    x, hidden = torch.randn(2, LENGTH, 32), ~right_padding()[:, 0, 0]
    expected = layer(x, src_key_padding_mask=hidden)
    for method in ("full", "sbcluster"):
        with scatterbrain.replace_sdpa(method, 16):
            out = layer(x, src_key_padding_mask=hidden)
        # its fast path gives zero for padding
        close = torch.allclose(out[~hidden], expected[~hidden], atol=1e-5)
        assert close
    with scatterbrain.replace_sdpa("sbcluster", 16) as replacement:
        layer(x)
    assert replacement.report() == {"routed": 1}


# Options ------------------------------------------------------------------------------------------------------------


def test_wrong_options_are_refused_at_once():
    with pytest.raises(UserError, match="Did you mean 'sbcluster'"):
        scatterbrain.replace_sdpa("sbclusters")
    with pytest.raises(UserError, match="has no option 'memory'"):
        scatterbrain.replace_sdpa("local", memory=1)
    with pytest.raises(UserError, match="causal is not an option here"):
        scatterbrain.replace_sdpa("local", causal=True)
    with pytest.raises(UserError, match="min_tokens"):
        scatterbrain.replace_sdpa("local", 0)


def test_modules_are_made_once_for_a_length_and_the_oldest_go(monkeypatch):
    monkeypatch.setattr("scatterbrain.integrations.router.MAX_MODULES", 2)
    router = Router("performer", 16)
    outs = [router.attend(*tensors(length), pass_on=None) for length in (20, 30, 20, 40, 30)]
    assert len(router._modules) == 2
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[4])


def test_copies_of_a_router_compute_the_same():
    router = Router("performer", 16, seed=3, memory_fraction=1 / 4)
    out = router.attend(*tensors(), pass_on=None)
    for other in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert other.counts() == {}
        assert torch.equal(other.attend(*tensors(), pass_on=None), out)


def test_options_of_layers():
    names = ["a.0", "a.1", "b"]
    options = {"method": "sbcluster", "min_tokens": 32, "num_steps": 2}
    layers = {"a.*": {"memory_fraction": 1 / 8}, "a.1": {"method": "local"}, "b": None}
    found = layer_routers(names, layers, 7, **options)
    assert [getattr(router, "method", None) for router in found.values()] == ["sbcluster", "local", None]
    assert found["a.0"].options == {"num_steps": 2, "memory_fraction": 1 / 8}
    assert (found["a.1"].options, found["a.1"].min_tokens, found["a.1"].seed) == ({}, 32, 8)
    assert layer_routers(names, {"a.*": {"seed": 40}}, 7, **options)["a.1"].seed == 40
    assert found["a.0"]._modules is not found["a.1"]._modules
    with pytest.raises(UserError, match="no layer is named 'c'"):
        layer_routers(names, {"c": None}, 0, **options)
