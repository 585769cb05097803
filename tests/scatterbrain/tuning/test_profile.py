"""`scatterbrain.profile`: which calls it finds, what it measures, and that the model stays as it was."""

from __future__ import annotations

import copy
import json
import re
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import scatterbrain
from scatterbrain.errors import UserError
from scatterbrain.integrations.router import OVERRIDE
from tests.scatterbrain.tuning.models import HEADS, LENGTH, WIDTH, Layer, Outer, grown, inputs, network

OPTIONS = {"min_tokens": 16, "repeats": 1}


def profile(model: nn.Module, x, methods=("local", "sbcluster"), budgets=(1 / 8, 1 / 2), **options):
    return scatterbrain.profile(model, x, methods, budgets, **{**OPTIONS, **options})


def errors(report: scatterbrain.ProfileReport) -> list[list[float | None]]:
    return [[measurement.error for measurement in call.measurements] for call in report.calls]


# Calls --------------------------------------------------------------------------------------------------------------


def test_calls_are_found_by_module_and_number():
    model = network(Layer(2), nn.GELU(), Outer())
    report = profile(model, inputs())
    assert [(call.name, call.index, call.label) for call in report.calls] == [
        *[("0", 0, "0"), ("0", 1, "0#1")],
        *[("2", 0, "2"), ("2.inner", 0, "2.inner"), ("2", 1, "2#1")],
    ]
    assert all(call.shape == [2, HEADS, LENGTH, WIDTH // HEADS] for call in report.calls)
    assert all(
        (call.num_keys, call.kv_heads, call.dtype, call.mask) == (LENGTH, 2, "float32", "none") for call in report.calls
    )
    assert [call.seed for call in report.calls] == [0, 1, 2, 3, 4]
    assert all(len(call.measurements) == 4 and not call.reasons() for call in report.calls)
    assert all(m.milliseconds > 0 for call in report.calls for m in call.measurements)


def test_the_models_own_call_and_a_shared_module():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()
            self.again = self.layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = F.scaled_dot_product_attention(*self.layer.heads(x)).transpose(1, 2).flatten(2)
            return self.again(self.layer(out))

    report = profile(grown(Model()), inputs())
    assert [(call.name, call.index, call.num_calls) for call in report.calls] == [("", 0, 1), ("layer", 0, 2)]
    assert report.calls[0].label == "(model)"


def test_errors_are_those_of_the_methods_output():
    model, x = network(Layer()), inputs()
    report = profile(model, x, ["performer"], [1 / 4], seed=3)
    query, key, value = model[0].heads(x)
    module = scatterbrain.create_attention("performer", LENGTH, WIDTH // HEADS, memory_fraction=1 / 4, seed=3)
    out = module(*(y.transpose(1, 2) for y in (query, key, value)))[0].transpose(1, 2)
    full = F.scaled_dot_product_attention(query, key, value)
    expected = ((out - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)).mean().item()
    assert errors(report) == [[pytest.approx(expected, rel=1e-4)]]


def test_effective_keys_are_exp_of_the_mean_entropy():
    model, x = network(Layer()), inputs()
    query, key, _ = model[0].heads(x)
    weights = (query @ key.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5).softmax(-1)
    expected = torch.special.entr(weights).sum(-1).mean().exp().item()
    (call,) = profile(model, x).calls
    assert call.effective_keys == pytest.approx(expected, rel=1e-4)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    weights = (query @ key.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5).masked_fill(~causal, -torch.inf).softmax(-1)
    expected = torch.special.entr(weights).sum(-1).mean().exp().item()
    model[0].options = {"is_causal": True}
    (call,) = profile(model, x).calls
    assert call.effective_keys == pytest.approx(expected, rel=1e-4)
    model[0].options = {"attn_mask": causal}
    (call,) = profile(model, x).calls
    assert call.effective_keys == pytest.approx(expected, rel=1e-4)


def test_a_method_that_is_exact_has_no_error():
    report = profile(network(Layer(), Outer()), inputs(), ["full", "strided"], [1.0])
    for call in report.calls:
        assert [m.budget for m in call.measurements] == [None, 1.0]
        assert all(m.error <= 1e-5 for m in call.measurements)


def test_several_batches_are_averaged():
    model = network(Layer())
    batches = [inputs(1, seed=1), inputs(3, seed=2)]
    alone = [errors(profile(model, x)) for x in batches]
    (together,) = errors(profile(model, batches))
    expected = [(a + 3 * b) / 4 for a, b in zip(alone[0][0], alone[1][0], strict=True)]
    assert together == pytest.approx(expected, rel=1e-5)
    (call,) = profile(model, batches).calls
    assert call.num_calls == 2
    (call,) = profile(model, [inputs(1, 32), inputs(1, 48), inputs(1, 40)]).calls
    assert (call.shape[2], call.min_tokens) == (48, 32)


def test_inputs_of_each_kind():
    model, x = network(Layer()), inputs()
    expected = errors(profile(model, x))
    for given in ((x,), {"x": x}, [x], [(x,)], [[x]], [{"x": x}], iter([x])):
        layer = model[0] if "dict" in repr(type(given)) or given == [{"x": x}] else model
        assert errors(profile(layer, given)) == expected


# Masks --------------------------------------------------------------------------------------------------------------


def right_padding() -> torch.Tensor:
    return (torch.arange(LENGTH) < torch.tensor([LENGTH, LENGTH - 20])[:, None])[:, None, None, :]


def test_calls_that_a_method_cannot_take_are_listed_with_the_reason():
    causal = network(Layer(is_causal=True))
    (call,) = profile(causal, inputs(), ["local", "pairedcluster"]).calls
    assert call.is_causal
    assert [m.error is not None for m in call.measurements] == [True, True, False, False]
    assert call.reasons() == {"causal, and pairedcluster is not": ["pairedcluster 1/8", "pairedcluster 1/2"]}
    other = network(Layer(attn_mask=torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()))
    report = profile(other, inputs())
    (call,) = report.calls
    assert call.mask == "other"
    assert errors(report) == [[None] * 4]
    assert list(call.reasons()) == ["attn_mask that differs by query or head"]
    assert "attn_mask that differs by query or head (all methods): 0" in str(report)
    (call,) = profile(network(), inputs(), min_tokens=LENGTH + 1).calls[:1]
    assert list(call.reasons()) == [f"fewer than {LENGTH + 1} tokens"]


@pytest.mark.parametrize("additive", [False, True])
def test_padding_is_left_out(additive):
    """The error is that of the samples without their padding."""
    mask = right_padding()
    if additive:
        mask = torch.zeros(2, 1, 1, LENGTH).masked_fill(~mask, -torch.inf)
    x = inputs()
    (call,) = profile(network(Layer(attn_mask=mask)), x, ["full", "local", "performer"], [1 / 4]).calls
    assert (call.mask, call.reasons()) == ("keys", {})
    assert call.measurements[0].error <= 1e-5
    assert call.measurements[2].error > 0.01
    changed = x.clone()
    changed[1, LENGTH - 20 :] += 5
    (again,) = profile(network(Layer(attn_mask=mask)), changed, ["full", "local", "performer"], [1 / 4]).calls
    for one, other in zip(call.measurements, again.measurements, strict=True):
        assert one.error == pytest.approx(other.error, rel=1e-4, abs=1e-6)


def test_a_method_that_takes_some_calls_only():
    """Calls that it did not take have no error, as with the plan applied."""

    class Model(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() if x.shape[0] == 1 else None
            return super().forward(x, attn_mask=mask)

    model = grown(Model())
    ((alone, _, _, _),) = errors(profile(model, inputs(3)))
    report = profile(model, [inputs(1), inputs(3)])
    (call,) = report.calls
    assert call.measurements[0].error == pytest.approx(3 / 4 * alone)
    assert call.measurements[0].reason == "attn_mask that differs by query or head"


def test_autocast_and_other_dtypes():
    model, x = network(Layer()), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        (call,) = profile(model, x, ["full", "local"]).calls
    assert 1e-4 < call.measurements[0].error < 0.02
    (call,) = profile(copy.deepcopy(model).double(), x.double(), ["full"]).calls
    assert call.measurements[0].error < 1e-12
    assert call.dtype == "float64"


def test_grouped_queries():
    class Model(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query, key, value = self.heads(x)
            return F.scaled_dot_product_attention(query, key[:, :1], value[:, :1], enable_gqa=True)

    (call,) = profile(grown(Model()), inputs(), ["full", "sbcluster"]).calls
    assert call.kv_heads == 1
    assert call.measurements[0].error <= 1e-5


def test_multi_head_attention_and_what_is_not_reached():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True), 2).eval()
    report = profile(encoder, inputs())
    assert [call.name for call in report.calls] == ["layers.0.self_attn", "layers.1.self_attn"]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.attention = Layer(), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(*[self.layer(x)] * 3)[0]

    report = profile(Model().eval(), inputs())
    assert report.not_reached == {"attention: nn.MultiheadAttention with need_weights=True": 1}
    assert "Not reached, attention" in str(report)
    with pytest.raises(UserError, match=r"made no call .* \(model\): nn.MultiheadAttention with need_weights=True"):
        profile(Model().eval().attention, (inputs(),) * 3)


# The model ----------------------------------------------------------------------------------------------------------


def test_the_model_and_the_program_stay_as_they_were():
    model = network(Layer(), nn.Dropout(0.5), nn.BatchNorm1d(LENGTH), Layer())
    model.train()
    model[1].eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first, second = (profile(model, inputs()) for _ in range(2))
    assert errors(first) == errors(second)
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_remains_after_an_exception():
    model = network(Layer(), Layer())
    model.train()
    with pytest.raises(TypeError):
        profile(model, {"input": inputs(), "wrong": 1})

    def fail(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(model, inputs(), on_call=fail)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert OVERRIDE.get() is None
    assert torch.overrides._get_current_function_mode() is None


def test_full_attention_is_what_the_model_computes_with():
    model, x = network(), inputs()
    seen = []
    model[2].register_forward_hook(lambda *args: seen.append(args[-1]))
    profile(model, x)
    with torch.no_grad():
        assert torch.equal(seen[0], model(x))


def test_other_threads_are_not_recorded():
    model, x = network(), inputs()
    done = threading.Event()

    def other(_: str) -> None:
        if not done.is_set():
            done.set()
            thread = threading.Thread(target=lambda: model(x))
            thread.start()
            thread.join()

    assert [call.num_calls for call in profile(model, x, on_call=other).calls] == [1, 1]


def test_compiled_models_are_profiled_as_they_are_without():
    model, x = network(), inputs()
    compiled = torch.compile(model, backend="eager")
    assert errors(profile(compiled, x)) == errors(profile(model, x))
    assert [call.name for call in profile(compiled, x).calls] == ["0", "2"]


@pytest.mark.filterwarnings("error")
def test_models_with_compiled_parts():
    """Names are those without the wrappers of the compiler."""
    model, x = network(Layer(), Outer(), Layer()), inputs()
    expected = profile(model, x)
    model[0].compile(backend="eager")
    model[1] = torch.compile(model[1], backend="eager")
    with torch.no_grad():
        model(x)
    report = profile(model, x)
    assert [call.label for call in report.calls] == ["0", "1", "1.inner", "1#1", "2"]
    assert errors(report) == errors(expected)


def test_calls_are_announced():
    names: list[str] = []
    profile(network(), inputs(), on_call=names.append)
    assert names == ["0", "2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["sblocl"]}, "Unknown attention 'sblocl'. Did you mean 'sblocal'"),
        ({"methods": "local"}, "methods='local' is not valid"),
        ({"methods": []}, "methods=.* is not valid"),
        ({"budgets": []}, "budgets=.* is not valid"),
        ({"budgets": [2.0]}, "budgets: 2.0 is not valid"),
        ({"budgets": ["1/8"]}, "budgets: '1/8' is not valid"),
        ({"min_tokens": 0}, "min_tokens=0"),
        ({"repeats": -1}, "repeats=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"x": 3}, "inputs is int"),
        ({"x": "photo.png"}, "inputs is str"),
        ({"x": []}, "inputs has no batch"),
        ({"x": [3]}, "inputs has a batch of int"),
        ({"model": torch.zeros(2)}, r"model is Tensor\. Give a torch\.nn\.Module"),
        ({"methods": [["local"]]}, r"methods: \['local'\] is no name"),
        ({"seed": 2**70}, "seed="),
        ({"cuda_graphs": "yes"}, "cuda_graphs"),
        ({"maps": True}, "maps: True is not valid. Give names of modules"),
        ({"maps": [3]}, "maps: 3 is not valid. Give names of modules"),
    ],
)
def test_wrong_input(options, message):
    with pytest.raises(UserError, match=message):
        profile(options.pop("model", network()), options.pop("x", inputs()), **options)


def test_methods_of_any_iterable_and_batches_without_samples():
    report = profile(network(), [inputs(), inputs(batch=0)], iter(["local", "strided"]))
    assert report.methods == ["local", "strided"]
    assert report.calls[0].effective_keys > 1
    assert report.calls[0].measurements[0].error > 0
    assert profile(network(), inputs(batch=0)).calls[0].effective_keys is None


# The report ---------------------------------------------------------------------------------------------------------


def test_tables_and_files(tmp_path):
    report = profile(network(Layer(), Layer(is_causal=True)), inputs(), ["full", "local", "pairedcluster"])
    text = str(report)
    assert all(
        word in text for word in ("full", "local", "pairedcluster", "1/8", "1/2", "effective keys", "causal, and")
    )
    path = tmp_path / "report.json"
    assert report.save(path) is None
    assert scatterbrain.ProfileReport.load(path) == report
    assert report.save(path) is None  # the same content
    path.write_text("mine")
    assert report.save(path) == tmp_path / "report.json.bak"
    assert (tmp_path / "report.json.bak").read_text() == "mine"
    path.write_text("mine, too")
    assert report.save(path) == tmp_path / "report.json.bak2"
    assert {file.name for file in tmp_path.iterdir()} == {"report.json", "report.json.bak", "report.json.bak2"}


def test_no_times(tmp_path):
    report = profile(network(), inputs(), repeats=0)
    assert all(measurement.milliseconds == 0 for call in report.calls for measurement in call.measurements)
    assert "x\n" not in str(report)
    report.save_html(tmp_path / "report.html")


def test_files_that_cannot_be_read_or_written(tmp_path):
    report = profile(network(), inputs())
    with pytest.raises(UserError, match="is a folder"):
        report.save(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        report.save(tmp_path / "missing" / "report.json")
    with pytest.raises(UserError, match="cannot be read"):
        scatterbrain.ProfileReport.load(tmp_path / "missing.json")
    path = tmp_path / "report.json"
    for content, message in (("{", "is no JSON"), ("[]", "is no 'scatterbrain profile"), ("{}", "is no 'scatterbrain")):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            scatterbrain.ProfileReport.load(path)
    report.save(path)
    content = json.loads(path.read_text())
    del content["calls"][0]["measurements"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is no complete report"):
        scatterbrain.ProfileReport.load(path)


def test_files_that_are_no_regular_files_stay(tmp_path):
    report = profile(network(), inputs(), repeats=0)
    (tmp_path / "null.json").symlink_to("/dev/null")
    assert report.save(tmp_path / "null.json") is None
    assert (tmp_path / "null.json").is_symlink()
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="cannot be written"):
        report.save(tmp_path / ("x" * 300))


def test_damaged_and_hostile_reports(tmp_path):
    path = tmp_path / "report.json"
    profile(network(), inputs(), repeats=0).save(path)
    content = json.loads(path.read_text())
    for changed in ({"calls": []}, {"methods": None}, {"budgets": ["a"]}, {"versions": 3}, {"thumbnails": [3]}):
        path.write_text(json.dumps(content | changed))
        with pytest.raises(UserError, match="is no complete report"):
            scatterbrain.ProfileReport.load(path)
    hostile = '"><script>alert(1)</script>'
    content["thumbnails"] = [hostile]
    content["calls"][0]["maps"] = [{"query": hostile, "label": hostile, "png": hostile}]
    content["calls"][0]["name"] = content["model"] = hostile
    path.write_text(json.dumps(content))
    scatterbrain.ProfileReport.load(path).save_html(tmp_path / "report.html")
    assert hostile not in (tmp_path / "report.html").read_text()


def test_the_page_is_self_contained_and_escapes_names(tmp_path):
    model = network()
    model.__class__ = type("<b>Model", (nn.Sequential,), {})
    report = profile(model, inputs())
    plan = scatterbrain.tune(report, max_error=10)
    path = tmp_path / "report.html"
    report.save_html(path, plan)
    text = path.read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;Model" in text
    assert not re.search(r"(src|href)=\"(?!data:)|https?://(?!www\.w3\.org)|@import|url\(", text)
    assert text.count("<rect") >= 8
    assert "aria-sort" in text
    assert text.count("<th scope") == text.count('<button type="button">')
    assert "Attention maps" not in text


def test_attention_maps_of_an_image(tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.layer = nn.Conv2d(3, WIDTH, 4, 4), Layer()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patches(x).flatten(2).mT
            return self.layer(torch.cat([x[:, :1], x], 1))

    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    report = profile(grown(Model()), images, maps=["layer"])
    (call,) = report.calls
    labels = ["full", "local 1/8", "sbcluster 1/8"]
    wanted = [(query, label) for query in ("centre", "first token") for label in labels]
    assert [(shown.query, shown.label) for shown in call.maps] == wanted
    assert len(report.thumbnails) == 1
    report.save_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 7
    report.save(tmp_path / "report.json")
    assert scatterbrain.ProfileReport.load(tmp_path / "report.json") == report


def test_maps_are_those_of_the_weights():
    image = pytest.importorskip("PIL.Image")
    import base64
    import io

    from scatterbrain.tuning.maps import png_of

    x = torch.linspace(0, 1, 20).reshape(4, 5)
    decoded = image.open(io.BytesIO(base64.b64decode(png_of(x))))
    assert decoded.size == (5, 4)
    indices = torch.tensor(list(decoded.tobytes())).reshape(4, 5)
    assert torch.equal(indices, (x.sqrt() * 255).round().long())


def test_the_figure():
    pytest.importorskip("matplotlib")
    figure = profile(network(Layer(), Layer(is_causal=True)), inputs()).figure()
    (axes, _) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1"]
    assert len(axes.texts) == 8


def test_rich_tables():
    console = pytest.importorskip("rich.console")
    report = profile(network(), inputs())
    recorded = console.Console(record=True, width=120)
    recorded.print(report)
    recorded.print(scatterbrain.tune(report, max_error=1))
    assert "sbcluster" in recorded.export_text()


def test_an_output_that_is_not_finite_has_no_error():
    report = profile(network(), inputs() * torch.nan, repeats=0)
    for measurement in report.calls[0].measurements:
        assert measurement.error is None
        assert measurement.reason == f"{measurement.method}: output or full attention's is not finite"
