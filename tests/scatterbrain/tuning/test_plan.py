"""`tune`, `Plan`, `apply`, `restore` and `Plan.check`: what is chosen, and that the model computes just that."""

from __future__ import annotations

import copy
import io
import json
import pickle
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import scatterbrain
from scatterbrain.errors import UserError
from scatterbrain.integrations.router import OVERRIDE
from scatterbrain.tuning import measuring
from scatterbrain.tuning.calls import CallReport, Measurement, PlannedCall
from scatterbrain.tuning.forwards import PlannedForward, applied_plan, call_counts
from tests.scatterbrain.tuning.models import HEADS, LENGTH, WIDTH, Layer, Outer, grown, inputs, network

ROOT = Path(__file__).resolve().parents[3]


def planned(
    name: str, method: str = "sbcluster", index: int = 0, budget: float | None = 1 / 4, **changed
) -> PlannedCall:
    values = {"seed": 7, "min_tokens": 16, "error": 0.1, "milliseconds": 1.0, "full_milliseconds": 2.0} | changed
    return PlannedCall(name, index, method, budget, **values)


def plan_of(*calls: PlannedCall) -> scatterbrain.Plan:
    return scatterbrain.Plan("Sequential", "cpu", {"torch": "2"}, "max_error=0.1", list(calls))


def attended(layer: Layer, x: torch.Tensor, method: str, **kwargs) -> torch.Tensor:
    """Output of a layer whose attention is computed by a module of the library."""
    query, key, value = layer.heads(x)
    module = scatterbrain.create_attention(method, x.shape[1], WIDTH // HEADS, memory_fraction=1 / 4, seed=7)
    out, _ = module(*(y.transpose(1, 2) for y in (query, key, value)), **kwargs)
    return x + layer.proj(out.flatten(2))


# Tune ---------------------------------------------------------------------------------------------------------------


def report_of(*calls: dict[str, tuple[float | None, float]]) -> scatterbrain.ProfileReport:
    """Report with the errors and times of methods, for each call; full attention takes 10 ms."""
    reports = []
    for number, methods in enumerate(calls):
        measurements = [
            Measurement(name, 1 / 8, error, None if error is None else time) for name, (error, time) in methods.items()
        ]
        shape = {"shape": [1, 2, 64, 16], "num_keys": 64, "kv_heads": 2, "value_width": 16, "dtype": "float32"}
        rest = {"is_causal": False, "mask": "none", "min_tokens": 64, "num_calls": 1, "effective_keys": 9.0}
        reports.append(
            CallReport(f"layer{number}", 0, **shape, **rest, milliseconds=10.0, seed=number, measurements=measurements)
        )
    return scatterbrain.ProfileReport("Model", "cpu", {"torch": "2"}, ["local", "cluster"], [1 / 8], reports)


REPORT = report_of(
    {"local": (0.3, 1.0), "cluster": (0.05, 4.0)},
    {"local": (0.08, 1.0), "cluster": (0.04, 4.0)},
    {"local": (0.2, 1.0), "cluster": (0.15, 12.0)},
    {"local": (None, 1.0), "cluster": (0.02, 10.0)},
)


def test_the_fastest_method_within_the_bound():
    plan = scatterbrain.tune(REPORT, max_error=0.1)
    assert [call.method for call in plan.calls] == ["cluster", "local", "full", "full"]
    assert [call.error for call in plan.calls] == [0.05, 0.08, 0, 0]
    assert [call.budget for call in plan.calls] == [1 / 8, 1 / 8, None, None]
    assert [call.seed for call in plan.calls] == [0, 1, 2, 3]
    assert [call.min_tokens for call in plan.calls] == [64] * 4
    assert plan.speed_up == pytest.approx(40 / (4 + 1 + 10 + 10))
    assert "1.60 times as fast" in str(plan)
    assert {call.method for call in scatterbrain.tune(REPORT, max_error=0).calls} == {"full"}


def test_a_speed_up_with_the_smallest_error():
    plan = scatterbrain.tune(REPORT, speed_up=1.5)
    assert max(call.error for call in plan.calls) == 0.08
    assert plan.speed_up >= 1.5
    plan = scatterbrain.tune(REPORT, speed_up=2)
    assert [call.error for call in plan.calls] == [0.05, 0.08, 0.2, 0]
    with pytest.raises(UserError, match=r"speed_up=4 is out of reach: .* 3\.08 times as fast"):
        scatterbrain.tune(REPORT, speed_up=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either max_error or speed_up"),
        ({"max_error": 0.1, "speed_up": 2}, "either max_error or speed_up"),
        ({"max_error": -1}, "max_error=-1"),
        ({"max_error": "0.1"}, "max_error='0.1'"),
        ({"max_error": float("nan")}, "max_error=nan"),
        ({"speed_up": 1}, "speed_up=1"),
    ],
)
def test_wrong_goals(options, message):
    with pytest.raises(UserError, match=message):
        scatterbrain.tune(REPORT, **options)


def test_a_profile_without_times_makes_no_plan():
    report = scatterbrain.profile(network(), inputs(), ["local"], [1 / 4], min_tokens=16, repeats=0)
    with pytest.raises(UserError, match="no times"):
        scatterbrain.tune(report, max_error=0.1)


# Files --------------------------------------------------------------------------------------------------------------


def test_plans_are_saved_and_loaded(tmp_path):
    plan = scatterbrain.tune(REPORT, max_error=0.1)
    assert plan.save(tmp_path / "plan.json") is None
    assert scatterbrain.Plan.load(tmp_path / "plan.json") == plan
    other = scatterbrain.tune(REPORT, max_error=0.2)
    assert other.save(tmp_path / "plan.json") == tmp_path / "plan.json.bak"
    assert scatterbrain.Plan.load(tmp_path / "plan.json.bak") == plan
    content = json.loads((tmp_path / "plan.json").read_text())
    content["calls"][0]["budgett"] = 1
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="is no complete plan"):
        scatterbrain.Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text('{"format": "scatterbrain profile 1"}')
    with pytest.raises(UserError, match="is no 'scatterbrain plan 1'"):
        scatterbrain.Plan.load(tmp_path / "plan.json")


# Apply --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["local", "performer", "sbcluster"])
def test_an_applied_plan_computes_the_planned_methods(method):
    model, x = network(), inputs()
    expected, state = model(x), copy.deepcopy(model.state_dict())
    plan = plan_of(planned("0", method), planned("2", "full", budget=None))
    assert scatterbrain.apply(model, plan) is model
    assert applied_plan(model) is plan
    torch.testing.assert_close(model(x), model[2](model[1](attended(model[0], x, method))))
    assert not torch.allclose(model(x), expected, atol=1e-3)
    assert call_counts(model) == {"0": {"routed": 2}}
    assert "forward" not in vars(model[2])

    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.load_state_dict(state)

    assert scatterbrain.restore(model) is model
    assert torch.equal(model(x), expected)
    assert not any(name in vars(module) for module in model.modules() for name in ("forward", "scatterbrain_plan"))
    assert applied_plan(model) is None


def test_the_errors_of_the_profile_are_those_of_the_plan():
    """Random parts of a layer are those that were profiled, also where they are not the first ones."""
    model, x = network(Layer(), Layer(), Layer()), inputs()
    report = scatterbrain.profile(model, x, ["performer"], [1 / 4], min_tokens=16, repeats=1, seed=4)
    assert [call.seed for call in report.calls] == [4, 5, 6]
    for number, call in enumerate(report.calls):
        outputs: list[torch.Tensor] = []
        handle = model[number].proj.register_forward_pre_hook(lambda _, args, to=outputs: to.append(args[0]))
        model(x)
        scatterbrain.apply(model, plan_of(planned(str(number), "performer", seed=call.seed)))
        model(x)
        scatterbrain.restore(model)
        handle.remove()
        full, out = (y.flatten(1) for y in outputs)
        error = ((out - full).norm(dim=1) / full.norm(dim=1)).mean().item()
        assert error == pytest.approx(call.measurements[0].error, rel=1e-4)


def test_calls_of_one_module_and_of_modules_inside_are_apart():
    x = inputs()
    model = grown(Outer())
    model.inner.requires_grad_(False)
    for calls, methods in (
        ([planned("", "local", 0)], ("local", "full", "full")),
        ([planned("", "local", 1)], ("full", "full", "local")),
        ([planned("", "local", 1), planned("inner", "performer")], ("full", "performer", "local")),
        ([planned("inner", "performer"), planned("", "sbcluster", 0)], ("sbcluster", "performer", "full")),
    ):
        scatterbrain.apply(model, plan_of(*calls))
        out = model(x)
        scatterbrain.restore(model)
        expected = x
        for layer, method in zip((model.own, model.inner, model.own), methods, strict=True):
            expected = attended(layer, expected, method)
        torch.testing.assert_close(out, expected)


def test_an_exact_plan_changes_nothing():
    model, x = network(Layer(2), Outer()), inputs()
    expected = model(x)
    names = [("0", 0), ("0", 1), ("1", 0), ("1", 1), ("1.inner", 0)]
    scatterbrain.apply(model, plan_of(*(planned(name, "strided", index, 1.0) for name, index in names)))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert call_counts(model) == {name: {"routed": 1} for name in ("0", "0#1", "1", "1#1", "1.inner")}


def test_other_calls_stay_with_pytorch():
    """Masks, causality and short sequences that the profile did not have are never dropped."""
    model, x = network(Layer(is_causal=True), Layer()), inputs()
    expected, short = model(x), model(x[:, :10])
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    masked = model[1](x, attn_mask=mask)
    scatterbrain.apply(model, plan_of(planned("0"), planned("1")))
    assert torch.equal(model[0](x), expected) is False
    scatterbrain.apply(model, plan_of(planned("0", "pairedcluster"), planned("1", "full", budget=None)))
    assert torch.equal(model(x), expected)
    assert call_counts(model) == {"0": {"causal, and pairedcluster is not": 1}}
    scatterbrain.apply(model, plan_of(planned("0"), planned("1")))
    assert torch.equal(model(x[:, :10]), short)
    assert torch.equal(model[1](x, attn_mask=mask), masked)
    assert call_counts(model)["1"] == {"fewer than 16 tokens": 1, "attn_mask that differs by query or head": 1}


@pytest.mark.parametrize(
    "changed",
    [
        {"name": 3},
        {"index": "0"},
        {"index": -1},
        {"method": None},
        {"method": ["local"]},
        {"budget": "1/4"},
        {"budget": float("nan")},
        {"seed": -1},
        {"min_tokens": 0},
        {"error": None},
        {"error": float("nan")},
        {"milliseconds": 0},
        {"full_milliseconds": "1"},
        {"num_calls": 0},
    ],
)
def test_damaged_plans(tmp_path, changed):
    path = tmp_path / "plan.json"
    plan_of(planned("0"), planned("2")).save(path)
    content = json.loads(path.read_text())
    content["calls"][1] |= changed
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"plan.json is no complete plan .*{next(iter(changed))}="):
        scatterbrain.Plan.load(path)


@pytest.mark.parametrize("changed", [{"calls": []}, {"calls": {}}, {"model": 3}, {"goal": None}, {"versions": [1]}])
def test_damaged_heads_of_plans(tmp_path, changed):
    path = tmp_path / "plan.json"
    plan_of(planned("0")).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(UserError, match=r"plan.json is no complete plan"):
        scatterbrain.Plan.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"plan.json is no JSON"):
        scatterbrain.Plan.load(path)


def test_arguments_of_other_types():
    model, plan = network(), plan_of(planned("0"))
    for wrong in (lambda: scatterbrain.apply(plan, model), lambda: scatterbrain.restore("model.pt")):
        with pytest.raises(UserError, match=r"model is (Plan|str)\. Give a torch\.nn\.Module"):
            wrong()
    with pytest.raises(UserError, match=r"plan is str\. Give what scatterbrain\.tune"):
        scatterbrain.apply(model, "plan.json")
    with pytest.raises(UserError, match=r"report is str\. Give what scatterbrain\.profile"):
        scatterbrain.tune("report.json", max_error=0.1)
    with pytest.raises(UserError, match="seed="):
        scatterbrain.apply(model, plan_of(planned("0", seed=2**70)))
    with pytest.raises(UserError, match="repeats=3"):
        plan.check(model, inputs(), repeats="3")


def test_a_plan_of_another_model_is_an_error():
    model, x = network(), inputs()
    expected = model(x)
    with pytest.raises(UserError, match=r"no module 'blocks\.0' for the call 'blocks\.0#1'"):
        scatterbrain.apply(model, plan_of(planned("0"), planned("blocks.0", index=1)))
    with pytest.raises(UserError, match="Unknown attention 'sblocl'"):
        scatterbrain.apply(model, plan_of(planned("0"), planned("2", "sblocl")))
    with pytest.raises(UserError, match="memory_fraction"):
        scatterbrain.apply(model, plan_of(planned("0", budget=7)))
    assert torch.equal(model(x), expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_plan_replaces_the_one_before():
    model, x = network(), inputs()
    scatterbrain.apply(model, plan_of(planned("0", "performer"), planned("2", "local")))
    scatterbrain.apply(model, plan_of(planned("2", "local")))
    torch.testing.assert_close(model(x), attended(model[2], model[1](model[0](x)), "local"))
    assert call_counts(model) == {"2": {"routed": 1}}


def test_a_forward_that_was_replaced_before_is_kept():
    """Such as the wrappers of other packages."""
    model, x = network(), inputs()
    original = model[0].forward
    wrapped = model[0].forward = lambda y: 2 * original(y)
    scatterbrain.apply(model, plan_of(planned("0", "local")))
    torch.testing.assert_close(model[0](x), 2 * attended(model[0], x, "local"))
    scatterbrain.restore(model)
    assert vars(model[0])["forward"] is wrapped


def test_copies_and_pickles():
    model, x = network(), inputs()
    expected = model(x)
    scatterbrain.apply(model, plan_of(planned("0", "performer"), planned("2")))
    out = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in copies:
        assert vars(other[0])["forward"].module is other[0]
        assert torch.equal(other(x), out)
        with torch.no_grad():
            other[0].proj.weight.zero_()
        assert torch.equal(model(x), out)
        scatterbrain.restore(other)
        assert not any("forward" in vars(module) for module in other.modules())
    scatterbrain.restore(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("method", ["performer", "sbcluster"])
def test_compiled_models(method):
    model, x = network(), inputs()
    scatterbrain.apply(model, plan_of(planned("0", method), planned("2", method)))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    assert call_counts(compiled) == {"0": {"routed": 2}, "2": {"routed": 2}}
    scatterbrain.restore(model)
    torch.testing.assert_close(compiled(x), model(x))
    scatterbrain.apply(compiled, plan_of(planned("0", "local")))  # names are those of the model inside
    torch.testing.assert_close(compiled(x), model[2](model[1](attended(model[0], x, "local"))))


def test_models_with_compiled_parts():
    model, x = network(Layer(), Outer()), inputs()
    plan = plan_of(planned("0", "performer"), planned("1", "local", 1), planned("1.inner"))
    expected, out = model(x), scatterbrain.apply(copy.deepcopy(model), plan)(x)
    torch._dynamo.reset()
    model[0].compile(backend="aot_eager")
    model[1] = torch.compile(model[1], backend="aot_eager")
    torch.testing.assert_close(model(x), expected)
    scatterbrain.apply(model, plan)
    torch.testing.assert_close(model(x), out)
    assert call_counts(model) == {"0": {"routed": 1}, "1#1": {"routed": 1}, "1.inner": {"routed": 1}}
    scatterbrain.restore(model)
    torch.testing.assert_close(model(x), expected)


def test_compiling_without_graph_breaks_is_an_error():
    model, x = network(), inputs()
    scatterbrain.apply(model, plan_of(planned("0")))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)


def test_distributed_data_parallel(tmp_path):
    if not torch.distributed.is_available() or torch.distributed.is_initialized():
        pytest.skip("torch.distributed is not available, or in use")
    model, x = network(), inputs()
    plan = plan_of(planned("0", "performer"))
    expected = scatterbrain.apply(copy.deepcopy(model), plan)(x)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        scatterbrain.apply(parallel, plan)  # names are those of the model inside
        out = parallel(x)
        out.sum().backward()
        assert torch.equal(out, expected)
        assert call_counts(parallel) == {"0": {"routed": 1}}
        assert all(parameter.grad is not None for parameter in model[0].parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_recordings_are_those_of_full_attention():
    model, x = network(), inputs()
    expected = model(x)
    scatterbrain.apply(model, plan_of(planned("0", "performer"), planned("2")))
    torch.testing.assert_close(torch.export.export(model, (x,), strict=False).module()(x), expected)


def test_a_plan_goes_before_replace_sdpa():
    model, x = network(), inputs()
    scatterbrain.apply(model, plan_of(planned("0", "performer")))
    with scatterbrain.replace_sdpa("local", 16, memory_fraction=1 / 4) as replacement:
        out = model(x)
    torch.testing.assert_close(out, attended(model[2], model[1](attended(model[0], x, "performer")), "local"))
    assert replacement.report() == {"routed": 1}


def test_autocast():
    model, x = network(Layer()), inputs()
    expected = model(x)
    scatterbrain.apply(model, plan_of(planned("0", "strided", budget=1.0)))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert call_counts(model) == {"0": {"routed": 1}}
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """Recomputed layers have the planned method, too."""
    model, x = network(), inputs().requires_grad_()
    scatterbrain.apply(model, plan_of(planned("0", "performer"), planned("2", "performer")))
    gradients = []
    for checkpoint in (True, False):
        model.zero_grad()
        out = x
        for layer in model:
            out = torch.utils.checkpoint.checkpoint(layer, out, use_reentrant=reentrant) if checkpoint else layer(out)
        out.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_threads():
    model, x = network(Layer(2), Outer()), inputs()
    plan = plan_of(planned("0", "performer", 1), planned("1", "local", 1), planned("1.inner"))
    scatterbrain.apply(model, plan)
    expected = model(x)
    results: dict[int, torch.Tensor] = {}

    def run(which: int) -> None:
        results[which] = [model(x) for _ in range(5)][-1]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results.values())
    assert call_counts(model) == {name: {"routed": 21} for name in ("0#1", "1#1", "1.inner")}


def test_nothing_remains_after_an_exception():
    model, x = network(), inputs()
    scatterbrain.apply(model, plan_of(planned("0"), planned("2")))
    with pytest.raises(TypeError):
        model[0](x, wrong=1)
    assert OVERRIDE.get() is None
    assert torch.overrides._get_current_function_mode() is None
    query = torch.randn(1, 2, LENGTH, 16)
    out = F.scaled_dot_product_attention(query, query, query)
    scatterbrain.restore(model)
    assert torch.equal(out, F.scaled_dot_product_attention(query, query, query))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_encoders_of_pytorch(gradients, padding):
    """Their fused operator, in evaluation without gradients, does not bypass the plan."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)
    model, x = grown(nn.TransformerEncoder(layer, 2)), inputs()
    mask = torch.arange(LENGTH) >= torch.tensor([LENGTH, LENGTH - 20])[:, None] if padding else None
    seen = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else ~mask
    with torch.set_grad_enabled(gradients):
        expected = model(x, src_key_padding_mask=mask)
        scatterbrain.apply(model, plan_of(planned("layers.1.self_attn", "strided", budget=1.0)))
        out = model(x, src_key_padding_mask=mask)
        torch.testing.assert_close(out[seen], expected[seen], rtol=1e-4, atol=1e-5)
        # nn.MultiheadAttention expands a padding mask to all heads
        outcome = "attn_mask that differs by query or head" if padding else "routed"
        assert call_counts(model) == {"layers.1.self_attn": {outcome: 1}}
        scatterbrain.apply(model, plan_of(planned("layers.1.self_attn", "local")))
        out = model(x, src_key_padding_mask=mask)
        assert call_counts(model) == {"layers.1.self_attn": {outcome: 1}}
        assert torch.allclose(out[seen], expected[seen], rtol=1e-4, atol=1e-5) == padding
        scatterbrain.restore(model)
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[seen], expected[seen])


def test_a_profile_of_a_model_with_a_plan_is_that_of_full_attention():
    model, x = network(), inputs()
    options = {"methods": ["local", "performer"], "budgets": [1 / 4], "min_tokens": 16, "repeats": 0}
    expected = scatterbrain.profile(model, x, **options)
    scatterbrain.apply(model, plan_of(planned("0", "performer"), planned("2")))
    assert scatterbrain.profile(model, x, **options) == expected
    assert call_counts(model) == {"0": {}, "2": {}}


# Check --------------------------------------------------------------------------------------------------------------


def test_a_check_measures_the_model_with_the_plan():
    model, x = network(), inputs(seed=5)
    plan = plan_of(planned("0", "performer"), planned("2", "full", budget=None))
    check = plan.check(model, [x[:1], x[1:]], repeats=1)
    assert not any("forward" in vars(module) for module in model.modules())
    with torch.no_grad():
        full = model(x)
        scatterbrain.apply(model, plan)
        out = model(x)
        scatterbrain.restore(model)
    error = ((out - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)).mean().item()
    assert check.outputs == {"output": pytest.approx(error, rel=1e-4)}
    assert check.error == check.outputs["output"]
    (call,) = check.calls
    (expected, _) = scatterbrain.profile(model, x, ["performer"], [1 / 4], seed=7, min_tokens=16, repeats=0).calls
    assert call.error == pytest.approx(expected.measurements[0].error, rel=1e-4)
    assert call.counts == {"routed": 2}
    text = str(check)
    assert all(
        word in text for word in ("Relative error of output", "performer 1/4", "2 batches", "Whole model", "2 routed")
    )


def test_a_check_leaves_an_applied_plan():
    model, x = network(), inputs()
    applied = plan_of(planned("0", "local"))
    scatterbrain.apply(model, applied)
    out = model(x)
    plan_of(planned("2")).check(model, x, repeats=0)
    assert applied_plan(model) is applied
    assert torch.equal(model(x), out)
    with pytest.raises(TypeError):
        plan_of(planned("2")).check(model, {"input": x, "wrong": 1}, repeats=0)
    assert applied_plan(model) is applied
    assert isinstance(vars(model[0])["forward"], PlannedForward)


def test_a_check_of_several_outputs():
    class Model(Layer):
        def forward(self, x: torch.Tensor) -> dict:
            out = super().forward(x)
            return {"logits": out.mean(), "hidden": (out, out[:, 0]), "count": 3, "ids": out.argmax()}

    check = plan_of(planned("", "local")).check(grown(Model()), inputs(), repeats=0)
    assert list(check.outputs) == ["logits", "hidden[0]", "hidden[1]"]
    assert all(error > 1e-4 for error in check.outputs.values())
    assert check.milliseconds is None


def test_a_check_of_a_model_that_changes_its_inputs():
    class Model(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mul_(2))

    model = grown(Model())
    plan = plan_of(planned("", "full", budget=None))
    assert plan.check(model, inputs(), repeats=0).error == 0


def test_a_check_of_outputs_that_cannot_be_compared():
    class Model(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            return out[out > 0]

    plan = plan_of(planned("", "local", budget=1 / 32))
    with pytest.raises(UserError, match="other names or shapes"):
        plan.check(grown(Model()), inputs(), repeats=0)
    with pytest.raises(UserError, match="no floating-point tensor to compare"):
        plan_of(planned("0")).check(network(), inputs(batch=0), repeats=0)


def test_short_times_of_a_check_are_of_many_runs(monkeypatch):
    # the first runs of a model take longer, with full attention or with the plan
    model, x = network(), inputs()
    count = []
    times = iter([9.0, 1.0, 9.0, 1.0, 9.0, 1.0] + 500 * [2.0, 2.0])
    monkeypatch.setattr(measuring, "_milliseconds", lambda call, device: count.append(1) or next(times))
    result = plan_of(planned("0", "full", budget=None)).check(model, x)
    assert len(count) == 200
    assert result.full_milliseconds == result.milliseconds == 2


def test_a_check_names_calls_that_are_not_made():
    check = plan_of(planned("0", "local", 3), planned("2", "local")).check(network(), inputs(), repeats=0)
    assert [call.counts for call in check.calls] == [{}, {"routed": 1}]
    assert "not called" in str(check)


# From one end to the other ------------------------------------------------------------------------------------------


def test_profile_tune_apply_restore(tmp_path):
    model, x = network(Layer(), Outer(), Layer(is_causal=True)), inputs()
    expected = model(x)
    report = scatterbrain.profile(model, x, ["local", "sbcluster"], [1 / 8, 1 / 2], min_tokens=16, repeats=1)
    for call in report.calls:  # the times of a test machine are what they are
        call.milliseconds = 1e9
    plan = scatterbrain.tune(report, max_error=1.0)
    plan.save(tmp_path / "plan.json")
    plan = scatterbrain.Plan.load(tmp_path / "plan.json")
    assert {call.method for call in plan.calls} - {"full"}
    scatterbrain.apply(model, plan)
    assert not torch.allclose(model(x), expected, atol=1e-3)
    assert all(counts == {"routed": 1} for counts in call_counts(model).values())
    scatterbrain.restore(model)
    assert torch.equal(model(x), expected)


def test_the_functions_are_not_hidden_by_modules():
    import scatterbrain.tuning.choosing
    import scatterbrain.tuning.profiling

    assert callable(scatterbrain.profile)
    assert callable(scatterbrain.tune)
    assert callable(scatterbrain.apply)


def test_the_documented_profile():
    """What docs/profile.md says of DINOv2-small."""
    report = scatterbrain.ProfileReport.load(ROOT / "docs/data/profile_dinov2.json")
    plan = scatterbrain.tune(report, max_error=0.1)
    replaced = [call for call in plan.calls if call.method != "full"]
    assert len(replaced) == 5
    assert [call.method_label for call in plan.calls[-2:]] == ["cluster 1/16"] * 2
    assert plan.speed_up == pytest.approx(1.21, abs=0.005)
    errors = [{m.label: m.error for m in call.measurements} for call in report.calls]
    assert errors[3]["sbcluster 1/4"] > 0.1
    parts = ("local", "performer", "sblocal")
    assert all(error > 0.1 for each in errors for label, error in each.items() if label.startswith(parts))
