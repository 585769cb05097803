"""Reading, converting and loading checkpoints, and every way in which that can go wrong."""

import argparse
import collections
import dataclasses
import datetime
import enum
import functools
import logging
import math
import os
import pathlib
import random
import re
import subprocess
import sys
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from pytorch_lightning.utilities.parsing import AttributeDict
from torch import nn

from scatterbrain.errors import UserError
from src.checkpoints import (
    PUBLISHED_CHECKPOINTS,
    convert_checkpoint_file,
    convert_t2t_vit_state_dict,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    unconvert_key,
)
from src.checkpoints.architecture import infer_architecture
from src.checkpoints.seeded_weights import published_shapes, seeded_weights
from src.checkpoints.unpickling import load_weights
from src.models.t2t_vit import T2T_VIT_VARIANTS, T2TViTVariant, create_t2t_vit

NUM_CLASSES = 5
IMAGE_SIZE = 32
PROJECTION_KEY = "patch_embed.attention1.attn.attention.projection_matrix"


@pytest.fixture(autouse=True)
def tiny_variants(monkeypatch):
    """Variants that load in no time; the twins differ in their heads alone, as t2t_vit_14 and its resnext do."""
    for name, variant in {
        "tiny_t": T2TViTVariant("transformer", 64, 2, 2),
        "tiny_t_deep": T2TViTVariant("transformer", 64, 3, 2),
        "tiny_twin_4": T2TViTVariant("performer", 64, 2, 4),
        "tiny_twin_8": T2TViTVariant("performer", 64, 2, 8),
    }.items():
        monkeypatch.setitem(T2T_VIT_VARIANTS, name, variant)


def make_model(variant="tiny_t", image_size=IMAGE_SIZE, num_classes=NUM_CLASSES, **options):
    return create_t2t_vit(variant, image_size=image_size, num_classes=num_classes, **options)


def make_official(variant="tiny_t", image_size=IMAGE_SIZE, num_classes=NUM_CLASSES):
    """State dict with published keys."""
    weights = seeded_weights(published_shapes(variant, num_classes, image_size))
    return {key: tensor.float() for key, tensor in weights.items()}


def assert_loaded(model, official, atol=0.0):
    state_dict = model.state_dict()
    assert {unconvert_key(key) for key in state_dict} == set(official)
    for key, tensor in state_dict.items():
        expected = official[unconvert_key(key)].to(tensor.dtype)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


def prefixed(prefix, state_dict):
    return {prefix + key: tensor for key, tensor in state_dict.items()}


def fails_with(call, *parts):
    """The message of the UserError that `call` raises, which has to hold all parts."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    for part in parts:
        assert str(part) in message
    return message


# --- names of keys -----------------------------------------------------------------------------------------------


def test_convert_renames_two_prefixes_and_nothing_else():
    tensors = [torch.zeros(1) for _ in range(5)]
    official = dict(
        zip(
            ["cls_token", "pos_embed", "tokens_to_token.project.bias", "blocks.0.tokens_to_token.x", "pos_embedding"],
            tensors,
            strict=True,
        )
    )
    converted = convert_t2t_vit_state_dict(official)
    assert list(converted) == [
        "cls_token",
        "pos_embed.pe",
        "patch_embed.project.bias",
        "blocks.0.tokens_to_token.x",
        "pos_embedding",
    ]
    assert all(converted_tensor is tensor for converted_tensor, tensor in zip(converted.values(), tensors, strict=True))
    assert convert_t2t_vit_state_dict(converted) == converted
    assert [unconvert_key(key) for key in converted] == list(official)


def test_convert_refuses_a_key_under_both_names():
    both = {"pos_embed": torch.zeros(1), "pos_embed.pe": torch.zeros(1)}
    fails_with(lambda: convert_t2t_vit_state_dict(both), "'pos_embed.pe' twice", "Remove one")


# --- formats -----------------------------------------------------------------------------------------------------


def write_legacy(state_dict, path):
    torch.save(state_dict, path, _use_new_zipfile_serialization=False)


def write_lightning(state_dict, path):
    converted = convert_t2t_vit_state_dict(state_dict)
    task = {**prefixed("model.", converted), "loss.weight": torch.ones(3)}
    torch.save({"pytorch-lightning_version": "2.5.0", "epoch": 3, "state_dict": task}, path)


def write_lightning_net(state_dict, path):
    task = {**prefixed("net._orig_mod.", state_dict), "criterion.weight": torch.ones(3)}
    torch.save({"pytorch-lightning_version": "2.5.0", "epoch": 3, "state_dict": task}, path)


def write_fsdp(state_dict, path):
    """Prefixes in the middle of a key, as wrapped blocks have them."""
    inner = {re.sub(r"^blocks\.(\d+)\.", r"blocks.\1._fsdp_wrapped_module.", key): x for key, x in state_dict.items()}
    assert inner != state_dict
    torch.save(prefixed("_fsdp_wrapped_module._orig_mod.", inner), path)


def write_training_run(state_dict, path):
    options = argparse.Namespace(model="t2t_vit_t_14", lr=1e-3)
    torch.save({"epoch": 3, "args": options, "metric": 81.7, "state_dict": state_dict}, path)


FORMATS = {
    "ema": (lambda sd, path: torch.save({"state_dict_ema": sd}, path), "state_dict_ema"),
    "ema_off": (lambda sd, path: torch.save({"state_dict_ema": None, "state_dict": sd}, path), "state_dict"),
    "state_dict": (lambda sd, path: torch.save({"state_dict": sd}, path), "state_dict"),
    "net": (lambda sd, path: torch.save({"net": prefixed("module.", sd), "acc": 98.3}, path), "net"),
    "training_run": (write_training_run, "state_dict"),
    "bare": (torch.save, "bare"),
    "ordered": (lambda sd, path: torch.save(collections.OrderedDict(sd), path), "bare"),
    "legacy": (write_legacy, "bare"),
    "module": (lambda sd, path: torch.save({"state_dict_ema": prefixed("module.", sd)}, path), "state_dict_ema"),
    "compiled": (lambda sd, path: torch.save(prefixed("module._orig_mod.", sd), path), "bare"),
    "model": (lambda sd, path: torch.save({"model": sd, "epoch": 3}, path), "model"),
    "model_state_dict": (
        lambda sd, path: torch.save({"model_state_dict": prefixed("net.", sd)}, path),
        "model_state_dict",
    ),
    "deepspeed": (lambda sd, path: torch.save({"module": sd, "dp_world_size": 1}, path), "module"),
    "two_levels": (lambda sd, path: torch.save({"model": {"state_dict": sd}}, path), "model.state_dict"),
    "backbone": (lambda sd, path: torch.save(prefixed("model.backbone.", sd), path), "bare"),
    "lightning_net": (write_lightning_net, "state_dict"),
    "fsdp": (write_fsdp, "bare"),
    "converted": (lambda sd, path: torch.save(convert_t2t_vit_state_dict(sd), path), "bare"),
    "lightning": (write_lightning, "state_dict"),
    "safetensors": (safetensors.torch.save_file, "bare"),
}


@pytest.mark.parametrize("file_name", ["weights.pth.tar", "weights.safetensors"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_loads_whatever_its_name(tmp_path, name, file_name):
    write, source_key = FORMATS[name]
    official = make_official()
    path = tmp_path / file_name
    write(official, path)

    contents = read_checkpoint(path)
    assert contents.variants == ("tiny_t",)
    assert contents.num_classes == NUM_CLASSES
    assert contents.image_size == IMAGE_SIZE
    assert contents.source_key == source_key
    assert contents.converted == (name == "converted")
    assert contents.file_format == ("safetensors" if name == "safetensors" else "torch")
    assert contents.num_parameters == sum(tensor.numel() for tensor in official.values())

    model = make_model()
    assert load_checkpoint(model, path) is None
    assert_loaded(model, official)


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    width: int = 3


HARMLESS = {
    "numpy": lambda: {"top1": np.float64(81.7), "rng": np.random.get_state(), "grid": np.arange(3)},
    "generator": lambda: np.random.default_rng(0),
    "rng": lambda: {"python": random.getstate(), "torch": torch.get_rng_state()},
    "defaultdict": lambda: collections.defaultdict(list, loss=[1.0]),
    "deque": lambda: collections.deque([1, 2]),
    "times": lambda: [datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(1)],
    "path": lambda: pathlib.Path("a/b"),
    "omegaconf": lambda: OmegaConf.create({"a": 1, "b": [1, {"c": "${a}"}]}),
    "attributes": lambda: AttributeDict(lr=0.1),
    "partial": lambda: functools.partial(torch.optim.AdamW, lr=0.1),
    "network": lambda: nn.Sequential(nn.Linear(2, 2), nn.GELU()),
    "enum": lambda: {Colour.RED: "a"},
    "dataclass": Settings,
    "sets": lambda: [frozenset([1]), {2}, range(3), slice(1), 1j, 10**700, bytearray(3)],
    "parameter": lambda: nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", HARMLESS)
def test_weights_load_beside_objects_of_other_classes(tmp_path, name, zipped):
    official = make_official()
    path = tmp_path / "weights.ckpt"
    weights = {key: tensor.half() if "norm" in key else tensor for key, tensor in official.items()}
    weights["head.weight"] = nn.Parameter(weights["head.weight"])
    content = {"hyper_parameters": HARMLESS[name](), "state_dict": weights, "x": np.float32(1)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    model = make_model()
    load_checkpoint(model, path)
    assert_loaded(model, {key: tensor.float() for key, tensor in weights.items()})


def test_the_state_dict_may_be_a_mapping_of_another_class(tmp_path):
    path = tmp_path / "weights.ckpt"
    official = make_official()
    torch.save({"model": AttributeDict(official)}, path)
    assert list(read_checkpoint(path).state_dict) == list(convert_t2t_vit_state_dict(official))


def test_views_and_shared_storage_are_read_as_they_were(tmp_path):
    path = tmp_path / "weights.ckpt"
    official = make_official()
    both = torch.cat([official["norm.weight"], official["norm.bias"]])
    official["norm.weight"], official["norm.bias"] = both.chunk(2)
    official["head.weight"] = official["head.weight"].t().contiguous().t()
    torch.save({"time": datetime.timedelta(1), "seen": torch.ones(2, dtype=torch.uint16), "model": official}, path)
    state_dict = read_checkpoint(path).state_dict
    for key in ("norm.weight", "norm.bias", "head.weight"):
        assert torch.equal(state_dict[key], official[key])


def test_several_networks_in_a_file_are_refused(tmp_path):
    path = tmp_path / "weights.ckpt"
    both = {**prefixed("model.", make_official()), **prefixed("net.", make_official())}
    torch.save({"pytorch-lightning_version": "2.5.0", "state_dict": both}, path)
    fails_with(lambda: read_checkpoint(path), path, "several networks", "'model.', 'net.'")
    torch.save({**make_official(), "module.norm.bias": torch.zeros(64)}, path)
    fails_with(lambda: read_checkpoint(path), path, "'norm.bias' twice")


def test_a_safetensors_file_that_begins_like_a_pickle_loads(tmp_path):
    official, path = make_official(), tmp_path / "weights"
    for padding in range(256):
        safetensors.torch.save_file(official, path, metadata={"padding": "x" * padding})
        if path.read_bytes()[:1] == b"\x80":
            break
    else:
        pytest.fail("no header of that length")
    model = make_model()
    load_checkpoint(model, path)
    assert_loaded(model, official)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load_into_a_float32_model(tmp_path, dtype):
    official = {key: tensor.to(dtype) for key, tensor in make_official().items()}
    torch.save(official, tmp_path / "weights.pth")
    model = make_model()
    load_checkpoint(model, tmp_path / "weights.pth")
    assert_loaded(model, official)
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())


def test_averaged_weights_are_preferred_and_that_is_logged(tmp_path, caplog):
    official = make_official()
    other = {key: torch.zeros_like(tensor) for key, tensor in official.items()}
    torch.save({"state_dict": other, "state_dict_ema": official}, tmp_path / "run.pth.tar")
    model = make_model()
    with caplog.at_level(logging.INFO, "src.checkpoints"):
        load_checkpoint(model, tmp_path / "run.pth.tar")
    assert_loaded(model, official)
    assert "'state_dict_ema' is used, 'state_dict' is not" in caplog.text


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(make_official(), tmp_path / "weights.pth")
    load_checkpoint(make_model(), "~/weights.pth")


# --- what may differ ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "wanted"), [(32, 64), (64, 32)])
def test_position_table_is_resized_bicubically(tmp_path, caplog, stored, wanted):
    official = make_official(image_size=stored)
    official["pos_embed"] = torch.rand_like(official["pos_embed"])
    torch.save(official, tmp_path / "weights.pth")
    model = make_model(image_size=wanted)
    with caplog.at_level(logging.INFO, "src.checkpoints"):
        load_checkpoint(model, tmp_path / "weights.pth")
    side, new_side = stored // 16, wanted // 16
    grid = official["pos_embed"][:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
    expected = torch.cat([official["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    assert_loaded(model, {**official, "pos_embed": expected}, atol=1e-6)
    assert f"resized from {stored} to {wanted} px" in caplog.text


def make_model_with_random_features(rows):
    return make_model(attention=[{"name": "performer", "nb_features": rows}, "full"])


def test_random_features_that_the_file_lacks_stay_the_models_own(tmp_path):
    official = make_official()
    torch.save(official, tmp_path / "weights.pth")
    model = make_model_with_random_features(12)
    drawn = model.state_dict()[PROJECTION_KEY].clone()
    load_checkpoint(model, tmp_path / "weights.pth")
    assert_loaded(model, {**official, unconvert_key(PROJECTION_KEY): drawn})


def test_random_features_of_the_same_shape_are_loaded(tmp_path):
    official = {**make_official(), unconvert_key(PROJECTION_KEY): torch.rand(12, 64)}
    torch.save(official, tmp_path / "weights.pth")
    model = make_model_with_random_features(12)
    load_checkpoint(model, tmp_path / "weights.pth")
    assert_loaded(model, official)


@pytest.mark.parametrize("rows", [0, 7])
def test_random_features_that_do_not_fit_are_ignored_with_a_word(tmp_path, caplog, rows):
    official = make_official()
    torch.save({**official, unconvert_key(PROJECTION_KEY): torch.rand(12, 64)}, tmp_path / "weights.pth")
    model = make_model()
    if rows:
        model = make_model_with_random_features(rows)
        official[unconvert_key(PROJECTION_KEY)] = model.state_dict()[PROJECTION_KEY].clone()
    with caplog.at_level(logging.INFO, "src.checkpoints"):
        load_checkpoint(model, tmp_path / "weights.pth")
    assert_loaded(model, official)
    assert f"'{PROJECTION_KEY}' does not fit" in caplog.text
    assert read_checkpoint(tmp_path / "weights.pth").num_parameters == sum(
        tensor.numel() for key, tensor in official.items() if not key.endswith("projection_matrix")
    )


@pytest.mark.parametrize("classes", [3, NUM_CLASSES])
def test_a_new_head_is_the_models_own_and_the_rest_the_files(tmp_path, classes):
    official = make_official(num_classes=classes)
    torch.save({"state_dict_ema": official}, tmp_path / "weights.pth")
    model = make_model()
    own = {key: tensor.clone() for key, tensor in model.state_dict().items() if key.startswith("head.")}
    assert set(own) == {"head.weight", "head.bias"}
    load_checkpoint(model, tmp_path / "weights.pth", new_head=True)
    assert_loaded(model, {**official, **own})


def test_a_new_head_excuses_nothing_else(tmp_path):
    official = make_official(num_classes=3)
    torch.save(make_official("tiny_t_deep", num_classes=3), tmp_path / "deep.pth")
    torch.save({**official, "head.weight": official["head.weight"] * math.nan}, tmp_path / "nan.pth")
    torch.save({key: value for key, value in official.items() if key != "norm.weight"}, tmp_path / "cut.pth")
    model = make_model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    message = fails_with(lambda: load_checkpoint(model, tmp_path / "deep.pth", new_head=True), "holds tiny_t_deep")
    assert "classes" not in message  # which do not matter
    fails_with(lambda: load_checkpoint(model, tmp_path / "nan.pth", new_head=True), "'head.weight' holds NaN")
    fails_with(lambda: load_checkpoint(model, tmp_path / "cut.pth", new_head=True), "it lacks 'norm.weight'")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


# --- which variant -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", sorted(T2T_VIT_VARIANTS))
def test_variant_is_inferred_from_shapes(variant):
    shapes = published_shapes(variant, num_classes=2, image_size=32)
    state_dict = convert_t2t_vit_state_dict({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()})
    twins = {"t2t_vit_14", "t2t_vit_14_resnext"}
    expected = twins if variant in twins else {variant}
    assert set(infer_architecture(state_dict).variants) == expected


def test_published_files_are_of_known_variants_and_named_once():
    assert {published.variant for published in PUBLISHED_CHECKPOINTS.values()} <= set(T2T_VIT_VARIANTS)
    names = [published.file_name for published in PUBLISHED_CHECKPOINTS.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("variant", ["tiny_twin_4", "tiny_twin_8"])
def test_a_file_of_twins_loads_into_either(tmp_path, variant):
    official = make_official("tiny_twin_4")
    torch.save(official, tmp_path / "weights.pth")
    assert read_checkpoint(tmp_path / "weights.pth").variants == ("tiny_twin_4", "tiny_twin_8")
    model = make_model(variant)
    load_checkpoint(model, tmp_path / "weights.pth")
    assert_loaded(model, official)


@pytest.mark.parametrize(
    ("stored", "classes", "wanted", "parts"),
    [
        ("tiny_t_deep", 5, "tiny_t", ["holds tiny_t_deep, but the model is tiny_t; use model/t2tmodel=tiny_t_deep."]),
        (
            "tiny_twin_8",
            5,
            "tiny_t",
            [
                "holds tiny_twin_4 or tiny_twin_8, but the model is tiny_t",
                "use model/t2tmodel=tiny_twin_4 or model/t2tmodel=tiny_twin_8.",
            ],
        ),
        ("tiny_t", 5, "tiny_twin_8", ["holds tiny_t, but the model is tiny_twin_8; use model/t2tmodel=tiny_t."]),
        ("tiny_t", 3, "tiny_t", ["has 3 classes, but the model has 5 classes; use model.num_classes=3."]),
        ("tiny_t", 1, "tiny_t", ["has 1 class, but"]),
        (
            "tiny_t_deep",
            3,
            "tiny_t",
            [
                "holds tiny_t_deep with 3 classes, but the model is tiny_t with 5 classes",
                "use model/t2tmodel=tiny_t_deep model.num_classes=3.",
            ],
        ),
    ],
)
def test_a_mismatch_names_what_the_file_holds_and_the_option(tmp_path, stored, classes, wanted, parts):
    path = tmp_path / "weights.pth"
    torch.save(make_official(stored, num_classes=classes), path)
    model = make_model(wanted)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fails_with(lambda: load_checkpoint(model, path), path, *parts)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_sizes_of_no_known_variant_are_reported(tmp_path, monkeypatch):
    official = make_official("tiny_t_deep")
    torch.save(official, tmp_path / "weights.pth")
    monkeypatch.delitem(T2T_VIT_VARIANTS, "tiny_t_deep")
    assert read_checkpoint(tmp_path / "weights.pth").variants == ()
    fails_with(
        lambda: load_checkpoint(make_model(), tmp_path / "weights.pth"),
        "transformer tokens, embed_dim 64, depth 3 and MLP width 192 (none of the known variants)",
        "use a checkpoint of one of: t2t_vit_7,",
    )


def make_nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)])


def edited(**changes):
    """Published state dict with entries replaced (dots as double underscores), or removed where None."""
    official = make_official()
    for key, value in changes.items():
        key = key.replace("__", ".")
        if value is None:
            del official[key]
        else:
            official[key] = value
    return official


@pytest.mark.parametrize(
    ("state_dict", "parts"),
    [
        ({"norm__bias": None}, ["it lacks 'norm.bias'", "Use a complete checkpoint"]),
        ({"blocks__0__norm1__bias": None, "norm__bias": None}, ["lacks 'blocks.0.norm1.bias', 'norm.bias'"]),
        ({"aux_head__weight": torch.zeros(5, 64)}, ["the model has no 'aux_head.weight'"]),
        ({"norm__bias": torch.zeros(65)}, ["'norm.bias' has shape (65,), in the model (64,)"]),
        ({"pos_embed": torch.zeros(1, 5, 65)}, ["'pos_embed.pe' has shape (1, 5, 65), in the model (1, 5, 64)"]),
    ],
    ids=["missing", "two_missing", "unexpected", "shape", "position_width"],
)
def test_loading_is_strict_and_changes_nothing_when_it_fails(tmp_path, state_dict, parts):
    path = tmp_path / "weights.pth"
    torch.save(edited(**state_dict), path)
    model = make_model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fails_with(lambda: load_checkpoint(model, path), path, "does not fit the model", *parts)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_missing_block_is_a_missing_block_and_not_a_shallower_model(tmp_path):
    official = {key: tensor for key, tensor in make_official().items() if not key.startswith("blocks.0.norm")}
    torch.save(official, tmp_path / "weights.pth")
    fails_with(
        lambda: load_checkpoint(make_model(), tmp_path / "weights.pth"),
        "it lacks 'blocks.0.norm1.weight', 'blocks.0.norm1.bias', 'blocks.0.norm2.weight' and 1 more",
    )


def test_another_network_is_named_with_the_options_for_it(tmp_path):
    torch.save(make_official(), tmp_path / "weights.pth")
    fails_with(lambda: load_checkpoint(nn.Linear(2, 2), tmp_path / "weights.pth"), "Linear", "create_t2t_vit")


# --- files that are no checkpoints -------------------------------------------------------------------------------


def test_missing_file_suggests_its_neighbours(tmp_path):
    torch.save(make_official(), tmp_path / "81.7_T2T_ViTt_14.pth.tar")
    path = tmp_path / "81.7_T2T_ViT_t_14.pth.tar"
    fails_with(
        lambda: read_checkpoint(path), f"{path} does not exist", f"Did you mean {tmp_path}/81.7_T2T_ViTt_14.pth.tar?"
    )


def test_missing_published_file_is_reported_with_its_download(tmp_path):
    fails_with(
        lambda: read_checkpoint(tmp_path / "81.7_T2T_ViTt_14.pth.tar"),
        "does not exist",
        "python scripts/download_checkpoint_t2t_vit.py t2t_vit_t_14",
    )


def test_missing_file_without_neighbours_and_missing_folder(tmp_path):
    fails_with(lambda: read_checkpoint(tmp_path / "x.pth"), "x.pth does not exist", f"the folder {tmp_path} holds no")
    fails_with(lambda: read_checkpoint(tmp_path / "no" / "x.pth"), f"The folder {tmp_path / 'no'} does not exist")


def test_folder(tmp_path):
    fails_with(lambda: read_checkpoint(tmp_path), f"{tmp_path} is a folder", "Give a file in it.")
    (tmp_path / "a.pth").touch()
    fails_with(lambda: read_checkpoint(tmp_path), f"such as {tmp_path / 'a.pth'}")


def test_a_fifo(tmp_path):
    os.mkfifo(tmp_path / "weights.pth")
    fails_with(lambda: read_checkpoint(tmp_path / "weights.pth"), "weights.pth is not a regular file")


def test_device_file():
    fails_with(lambda: read_checkpoint(os.devnull), os.devnull, "not a regular file")


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    torch.save(make_official(), path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # not chmod, which does not stop root
    fails_with(lambda: read_checkpoint(path), f"{path} cannot be read (Permission denied)", "Check its permissions")


NOT_CHECKPOINTS = {
    "empty": (b"", ["is empty", "Download it again"]),
    "html": (b"\n <!DOCTYPE html><html><body>Sign in</body></html>", ["is a web page", "Download it again"]),
    "html_bom": (b"\xef\xbb\xbf<html></html>", ["is a web page"]),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 86000000\n",
        ["Git LFS pointer", "git lfs pull"],
    ),
    "text": (b"hello, world\n", ["is not a checkpoint", "Check the path"]),
    "zeros": (bytes(5000), ["is not a checkpoint"]),
    "pickle_start": (b"\x80\x02", ["truncated or damaged", "Download it again"]),
}


@pytest.mark.parametrize("name", NOT_CHECKPOINTS)
def test_files_that_are_something_else(tmp_path, name):
    content, parts = NOT_CHECKPOINTS[name]
    path = tmp_path / "weights.pth.tar"
    path.write_bytes(content)
    fails_with(lambda: read_checkpoint(path), path, *parts)


def test_archives(tmp_path):
    torch.save(make_official(), tmp_path / "weights.pth")
    with tarfile.open(tmp_path / "weights.pth.tar", "w") as archive:
        archive.add(tmp_path / "weights.pth", "weights.pth")
    fails_with(lambda: read_checkpoint(tmp_path / "weights.pth.tar"), "is a tar archive", "tar -xf weights.pth.tar")
    with zipfile.ZipFile(tmp_path / "weights.zip", "w") as archive:
        archive.write(tmp_path / "weights.pth", "weights.pth")
    fails_with(lambda: read_checkpoint(tmp_path / "weights.zip"), "not a file of torch.save")


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", ["bare", "legacy", "safetensors"])
def test_truncated_files(tmp_path, name, fraction):
    path = tmp_path / ("weights.safetensors" if name == "safetensors" else "weights.pth")
    FORMATS[name][0](make_official(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    fails_with(lambda: read_checkpoint(path), path, "truncated or damaged", "Download it again")


class RunsCode:
    """What a hostile file holds: unpickled by an ordinary reader, it runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, zipped):
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    hostile = RunsCode(f"touch {trace}")
    torch.save({**make_official(), "extra": hostile}, path, _use_new_zipfile_serialization=zipped)
    fails_with(lambda: load_checkpoint(make_model(), path), path, "contains code", "was not run", "source you trust")
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the file is not hostile, so the test proves nothing"


class Calls:
    """What a hostile file holds: unpickled by an ordinary reader, it calls `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("call", "named"),
    [
        (Calls(os.system, "touch trace"), "system"),
        (Calls(eval, "open('trace', 'w')"), "builtins.eval"),
        (Calls(exec, "open('trace', 'w')"), "builtins.exec"),
        (Calls(subprocess.Popen, ["touch", "trace"]), "subprocess.Popen"),
        (Calls(getattr, nn.Linear, "forward"), "builtins.getattr"),
        (Calls(open, "trace", "w"), "open"),
        (Calls(torch.load, "trace"), "torch.serialization.load"),
        (Calls(np.save, "trace", 1), "numpy.save"),
        (Calls(pathlib.Path.touch, pathlib.Path("trace")), "getattr"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_code_beside_harmless_objects_is_refused_and_not_run(tmp_path, monkeypatch, call, named, zipped):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    content = {"time": datetime.timedelta(1), "extra": {"deep": [call]}, "model": make_official()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    fails_with(lambda: load_checkpoint(make_model(), path), path, "contains code", named, "was not run")
    assert not (tmp_path / "trace").exists()


def test_nothing_is_imported(tmp_path):
    (tmp_path / "unheard_of.py").write_text("class Options:\n    pass\n")
    path = tmp_path / "weights.pth"
    script = "import sys, torch, unheard_of; torch.save({'o': unheard_of.Options(), 'w': torch.ones(2)}, sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, path], check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    content = load_weights(path)
    assert torch.equal(content["w"], torch.ones(2))
    assert content["o"].full_name == "unheard_of.Options"
    assert "unheard_of" not in sys.modules


@pytest.mark.parametrize("key", ["model", "state_dict", "net"])
def test_a_whole_network_under_a_key_is_refused_by_name(tmp_path, key):
    torch.save({key: nn.Linear(2, 2)}, tmp_path / "weights.pth")
    fails_with(lambda: read_checkpoint(tmp_path / "weights.pth"), "contains code", "torch.nn.modules.linear.Linear")


def test_a_whole_pickled_network_is_refused_by_name(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "weights.pth")
    fails_with(
        lambda: read_checkpoint(tmp_path / "weights.pth"), "torch.nn.modules.linear.Linear", "model.state_dict()"
    )


RESNET = {"conv1.weight": torch.zeros(2, 3, 7, 7), "bn1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}
VIT = {
    "cls_token": torch.zeros(1, 1, 8),
    "pos_embed": torch.zeros(1, 5, 8),
    "patch_embed.proj.weight": torch.zeros(8, 3, 16, 16),
    "blocks.0.mlp.fc1.weight": torch.zeros(32, 8),
    "head.weight": torch.zeros(5, 8),
}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (RESNET, ["is not a T2T-ViT checkpoint", "'conv1.weight', 'bn1.weight', 'fc.bias'"]),
        ({"state_dict": RESNET}, ["'conv1.weight'"]),
        (VIT, ["is not a T2T-ViT checkpoint", "'pos_embed'", "and 2 more"]),
        ({"network": RESNET, "epoch": 3}, ["is not a T2T-ViT checkpoint", "'network', 'epoch'"]),
        ({"model": RESNET, "epoch": 3}, ["is not a T2T-ViT checkpoint", "'conv1.weight'"]),
        ({}, ["holds no weights", "Use another checkpoint"]),
        ({"state_dict_ema": {}}, ["holds no weights"]),
        ([1, 2], ["holds a list", "torch.save(model.state_dict(), ...)"]),
        (torch.zeros(3), ["holds a Tensor"]),
        ({3: torch.zeros(2)}, ["'3'"]),
        ({"pytorch-lightning_version": "2.5.0", "state_dict": {"net.w": torch.zeros(2)}}, ["'net.w'"]),
    ],
    ids=[
        "resnet",
        "nested_resnet",
        "vit",
        "unknown_key",
        "nested_in_model",
        "empty",
        "empty_ema",
        "list",
        "tensor",
        "number",
        "lightning",
    ],
)
def test_content_that_is_no_t2t_vit(tmp_path, content, parts):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    fails_with(lambda: read_checkpoint(path), path, *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"head__weight": None}, ["not a complete T2T-ViT", "it lacks 'head.weight'"]),
        ({"cls_token": torch.zeros(())}, ["lacks 'cls_token'"]),
        ({"norm__bias": torch.full((64,), torch.nan)}, ["is corrupted", "'norm.bias' holds NaN", "Download".lower()]),
        ({"norm__bias": torch.full((64,), torch.inf)}, ["is corrupted", "'norm.bias'"]),
        ({"norm__bias": torch.zeros(64, dtype=torch.int8)}, ["'norm.bias'", "torch.int8", "unquantised"]),
        ({"norm__bias": torch.zeros(64, dtype=torch.complex64)}, ["'norm.bias'", "torch.complex64"]),
        ({"norm__bias": torch.zeros(64).to_sparse()}, ["'norm.bias'", "sparse"]),
        ({"norm__bias": torch.zeros(64, device="meta")}, ["'norm.bias'", "meta"]),
        (
            {"norm__bias": torch.zeros(1).expand(10**6, 10**6)},
            ["is damaged", "'norm.bias' has shape (1000000, 1000000)"],
        ),
        ({"note": torch.zeros(1).expand(10**6, 10**6)}, ["is damaged", "'note' has shape"]),
        ({"head__weight": torch.zeros(1).expand(10**6, 10**6)}, ["is damaged", "'head.weight' has shape"]),
        ({"cls_token": torch.zeros(1).expand(1, 1, 10**12)}, ["is damaged", "'cls_token' has shape"]),
        ({"norm__bias": make_nested()}, ["'norm.bias'", "layout nested", "dense"]),
        ({"head__weight": make_nested()}, ["'head.weight'", "layout nested", "dense"]),
        ({"cls_token": np.zeros((1, 1, 64), dtype=np.float32)}, ["'cls_token' is a ", "not a tensor"]),
        ({"note": "mine"}, ["'note' is a str", "torch.save(model.state_dict(), ...)"]),
        ({"pos_embed": torch.zeros(1, 7, 64)}, ["position table has shape (1, 7, 64)"]),
        ({"pos_embed": torch.zeros(5, 64)}, ["position table has shape (5, 64)"]),
        ({"pos_embed__pe": torch.zeros(1, 5, 64)}, ["'pos_embed.pe' twice"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("beside", [{}, {"time": datetime.timedelta(1)}], ids=["plain", "beside_objects"])
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_damaged_content(tmp_path, changes, parts, beside):
    path = tmp_path / "weights.pth"
    content = edited(**changes)
    torch.save({"state_dict": content, **beside} if beside else content, path)
    unread = beside and not {"sparse", "meta", "layout nested"}.isdisjoint(parts)  # no dense tensor: it is not built
    fails_with(lambda: read_checkpoint(path), path, *(parts[:1] if unread else parts))


@pytest.mark.parametrize("beside", [{}, {"time": datetime.timedelta(1)}], ids=["plain", "beside_objects"])
def test_a_shape_beyond_its_storage_is_refused(tmp_path, beside):
    path = tmp_path / "weights.pth"
    weights = make_official()
    weights["norm.bias"] = torch.zeros(5, 1).expand(5, 3).as_strided((5, 3), (1, 0))
    torch.save({"state_dict": weights, **beside}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    # the sizes 5 and 3 and strides 1 and 0 of the pickle become 255 and 3, and 255 and 0
    (pickled,) = (name for name in members if name.endswith("data.pkl"))
    sizes = re.compile(rb"K\x05K\x03\x86(q.|r....)K\x01K\x00\x86", re.DOTALL)
    members[pickled], count = sizes.subn(
        lambda match: b"K\xffK\x03\x86" + match[1] + b"K\xffK\x00\x86", members[pickled]
    )
    assert count == 1
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    fails_with(lambda: read_checkpoint(path), path, "damaged")


# --- conversion of files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"converted"}))
def test_conversion_in_place_keeps_the_original(tmp_path, name):
    official = make_official()
    path = tmp_path / "weights.pth.tar"
    FORMATS[name][0](official, path)
    original = path.read_bytes()

    conversion = convert_checkpoint_file(path)
    assert conversion.written
    assert conversion.backup == tmp_path / "weights.pth.tar.og"
    assert conversion.backup.read_bytes() == original
    contents = read_checkpoint(path)
    assert contents.converted
    assert contents.file_format == ("safetensors" if name == "safetensors" else "torch")
    model = make_model()
    load_checkpoint(model, path)
    assert_loaded(model, official)

    converted = path.read_bytes()
    again = convert_checkpoint_file(path)
    assert not again.written
    assert again.backup is None
    assert path.read_bytes() == converted
    assert conversion.backup.read_bytes() == original
    assert len(list(tmp_path.iterdir())) == 2


def test_converted_file_is_what_the_reference_writes(tmp_path):
    official = make_official()
    torch.save({"state_dict_ema": official}, tmp_path / "weights.pth")
    convert_checkpoint_file(tmp_path / "weights.pth")
    written = torch.load(tmp_path / "weights.pth", weights_only=True)
    assert type(written) is dict
    assert list(written) == list(convert_t2t_vit_state_dict(official))


@pytest.mark.parametrize("output_name", ["out.pth", "out.safetensors"])
def test_output_leaves_the_file_alone(tmp_path, output_name):
    official = make_official()
    path, output = tmp_path / "weights.pth", tmp_path / output_name
    torch.save({"state_dict": official}, path)
    original = path.read_bytes()
    conversion = convert_checkpoint_file(path, output)
    assert (conversion.path, conversion.written, conversion.backup) == (output, True, None)
    assert path.read_bytes() == original
    contents = read_checkpoint(output)
    assert contents.converted
    assert contents.file_format == ("safetensors" if output_name.endswith("safetensors") else "torch")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([path.name, output.name])


def test_output_that_exists_is_kept(tmp_path):
    path, output = tmp_path / "weights.pth", tmp_path / "out.pth"
    torch.save({"state_dict": make_official()}, path)
    output.write_text("mine")
    fails_with(lambda: convert_checkpoint_file(path, output), output, "is not overwritten", "choose another")
    assert output.read_text() == "mine"
    fails_with(lambda: convert_checkpoint_file(path, path), "is not overwritten")


def test_a_backup_that_is_another_file_is_kept(tmp_path):
    path, backup = tmp_path / "weights.pth", tmp_path / "weights.pth.og"
    torch.save({"state_dict": make_official()}, path)
    original = path.read_bytes()
    backup.write_text("mine")
    fails_with(lambda: convert_checkpoint_file(path), path, backup, "Move the backup away", "--output")
    assert backup.read_text() == "mine"
    assert path.read_bytes() == original


def test_a_backup_is_not_converted_in_place(tmp_path):
    backup = tmp_path / "weights.pth.og"
    torch.save({"state_dict": make_official()}, backup)
    original = backup.read_bytes()
    fails_with(lambda: convert_checkpoint_file(backup), backup, "--output")
    assert backup.read_bytes() == original
    convert_checkpoint_file(backup, tmp_path / "weights.pth")
    assert backup.read_bytes() == original


def hard_links_fail(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


# Without hard links the backup is a copy, which takes a rename of its own.
@pytest.mark.parametrize(("links", "step"), [(True, 1), (False, 1), (False, 2)])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_conversion_loses_nothing_and_can_be_repeated(tmp_path, monkeypatch, links, error, step):
    path, backup = tmp_path / "weights.pth", tmp_path / "weights.pth.og"
    torch.save({"state_dict": make_official()}, path)
    original = path.read_bytes()
    if not links:
        hard_links_fail(monkeypatch)
    replace, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == step:
            raise error
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises((KeyboardInterrupt, UserError)):
            convert_checkpoint_file(path)
    assert len(calls) == step
    assert path.read_bytes() == original
    assert not backup.exists() or backup.read_bytes() == original
    assert {entry.name for entry in tmp_path.iterdir()} <= {path.name, backup.name}, "a temporary file was left"

    assert convert_checkpoint_file(path).written
    assert backup.read_bytes() == original
    assert read_checkpoint(path).converted


def test_a_symbolic_link_is_replaced_and_its_target_left_alone(tmp_path):
    store, path = tmp_path / "store.pth", tmp_path / "weights.pth"
    torch.save({"state_dict": make_official()}, store)
    original = store.read_bytes()
    path.symlink_to(store)
    conversion = convert_checkpoint_file(path)
    assert store.read_bytes() == original
    assert conversion.backup.read_bytes() == original
    assert not conversion.backup.is_symlink()
    assert read_checkpoint(path).converted


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed\nmore")

    monkeypatch.setattr(torch, "save", full)
    fails_with(
        lambda: save_checkpoint({}, tmp_path / "weights.pth"),
        f"{tmp_path / 'weights.pth'} could not be written (PytorchStreamWriter failed",
        "Check the free space",
    )
    assert not list(tmp_path.iterdir())


def test_summary_lists_the_facts(tmp_path):
    torch.save({"state_dict_ema": make_official()}, tmp_path / "weights.pth")
    contents = read_checkpoint(tmp_path / "weights.pth")
    lines = contents.summary(sha256="abc", original_kept_at="x.og").splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines if not line.startswith(("weights", "image", "original")))
    assert facts == {
        "variant": "tiny_t",
        "parameters": f"{contents.num_parameters:,}",
        "classes": "5",
        "sha256": "abc",
    }
    assert "original kept at  x.og" in lines
    assert len({line.index(line.split("  ")[-1].strip(), 10) for line in lines}) == 1, "values are aligned"


def test_the_first_address_holds_the_same_functions():
    from src.utils import checkpoint

    assert checkpoint.load_checkpoint is load_checkpoint
    assert checkpoint.convert_t2t_vit_state_dict is convert_t2t_vit_state_dict
