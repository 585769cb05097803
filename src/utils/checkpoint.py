"""Reading, checking, converting and loading T2T-ViT checkpoints.

A checkpoint comes in many wrappings: `{"state_dict_ema": ...}` as published, `{"state_dict": ...}` of a training run,
a bare state dict, a Lightning checkpoint, safetensors; with or without the `module.` of a parallel wrapper. All of
them are reduced to one state dict in the keys of `create_t2t_vit`'s models. No code in a file is ever run.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import math
import os
import pickle
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from scatterbrain.errors import UserError
from src.models.modules.tokens_to_token import TOTAL_STRIDE
from src.models.t2t_vit import T2T_VIT_VARIANTS, resize_position_table
from src.utils.files import atomic_write, sha256_of_file

logger = logging.getLogger(__name__)

PUBLISHED_URL = "https://github.com/yitu-opensource/T2T-ViT/releases/download/main/"
BACKUP_SUFFIX = ".og"

# Published prefix -> ours.
RENAMED_PREFIXES = {"tokens_to_token.": "patch_embed."}
# Published key -> ours.
RENAMED_KEYS = {"pos_embed": "pos_embed.pe"}
# Where files keep their state dict, best first: evaluation figures are those of the averaged weights.
STATE_DICT_KEYS = ("state_dict_ema", "state_dict", "net")
# What wrappers (DataParallel, torch.compile) put before every key.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
LIGHTNING_PREFIX = "model."
# Rows of random features belong to the attention of the model at hand, not to the trained network.
RANDOM_FEATURES = ".projection_matrix"
# The tensors whose shapes tell the variant.
TELLTALE_KEYS = (
    "cls_token",
    "pos_embed.pe",
    "patch_embed.project.weight",
    "blocks.0.mlp.fc1.weight",
    "head.weight",
)
POSITION_KEY = "pos_embed.pe"
HEAD_PREFIX = "head."
TOKEN_STAGE_PREFIX = "patch_embed.attention1."


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A file of the T2T-ViT release.

    Attributes:
        file_name: its name under `PUBLISHED_URL`; it begins with the top-1 accuracy in percent (ends with it for
            the CIFAR files).
        variant: one of `T2T_VIT_VARIANTS`.
        image_size: height and width of the images it was trained on, in pixels.
        num_classes: number of classes.
    """

    file_name: str
    variant: str
    image_size: int = 224
    num_classes: int = 1000


# The token-labelling file of the 24-block model (84.2) is left out: it was trained by other code, with a second head.
PUBLISHED_CHECKPOINTS: dict[str, PublishedCheckpoint] = {
    "t2t_vit_7": PublishedCheckpoint("71.7_T2T_ViT_7.pth.tar", "t2t_vit_7"),
    "t2t_vit_10": PublishedCheckpoint("75.2_T2T_ViT_10.pth.tar", "t2t_vit_10"),
    "t2t_vit_12": PublishedCheckpoint("76.5_T2T_ViT_12.pth.tar", "t2t_vit_12"),
    "t2t_vit_14": PublishedCheckpoint("81.5_T2T_ViT_14.pth.tar", "t2t_vit_14"),
    "t2t_vit_19": PublishedCheckpoint("81.9_T2T_ViT_19.pth.tar", "t2t_vit_19"),
    "t2t_vit_24": PublishedCheckpoint("82.3_T2T_ViT_24.pth.tar", "t2t_vit_24"),
    "t2t_vit_t_14": PublishedCheckpoint("81.7_T2T_ViTt_14.pth.tar", "t2t_vit_t_14"),
    "t2t_vit_t_19": PublishedCheckpoint("82.4_T2T_ViTt_19.pth.tar", "t2t_vit_t_19"),
    "t2t_vit_t_24": PublishedCheckpoint("82.6_T2T_ViTt_24.pth.tar", "t2t_vit_t_24"),
    "t2t_vit_14_384": PublishedCheckpoint("83.3_T2T_ViT_14.pth.tar", "t2t_vit_14", image_size=384),
    "t2t_vit_14_cifar10": PublishedCheckpoint("cifar10_t2t-vit_14_98.3.pth", "t2t_vit_14", num_classes=10),
    "t2t_vit_19_cifar10": PublishedCheckpoint("cifar10_t2t-vit_19_98.4.pth", "t2t_vit_19", num_classes=10),
    # "cirfar" is how the file is published.
    "t2t_vit_14_cifar100": PublishedCheckpoint("cirfar100_t2t-vit-14_88.4.pth", "t2t_vit_14", num_classes=100),
    "t2t_vit_19_cifar100": PublishedCheckpoint("cifar100_t2t-vit-19_89.0.pth", "t2t_vit_19", num_classes=100),
}


@dataclass(frozen=True)
class Architecture:
    """What the shapes of a state dict tell about its network; the number of heads leaves no trace in them.

    Attributes:
        tokens: kind of the token stages, `transformer` or `performer`.
        embed_dim: width of the backbone.
        depth: number of backbone blocks.
        mlp_dim: hidden width of the backbone's MLPs.
    """

    tokens: str
    embed_dim: int
    depth: int
    mlp_dim: int

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants of these sizes: none, one, or several that differ in their heads alone."""
        return tuple(
            name
            for name, variant in T2T_VIT_VARIANTS.items()
            if self
            == Architecture(
                variant.tokens, variant.embed_dim, variant.depth, int(variant.embed_dim * variant.mlp_ratio)
            )
        )

    def __str__(self) -> str:
        return " or ".join(self.variants) or (
            f"a T2T-ViT with {self.tokens} tokens, embed_dim {self.embed_dim}, depth {self.depth} and MLP width "
            f"{self.mlp_dim} (none of the known variants)"
        )


@dataclass(frozen=True)
class CheckpointContents:
    """What `read_checkpoint` found in a file.

    Attributes:
        state_dict: tensors on the CPU, in the keys of `create_t2t_vit`'s models and the precision of the file.
        architecture: sizes of the network.
        num_classes: number of classes.
        image_size: height and width of the images in pixels that the position table is for.
        source_key: where the file keeps the weights: `"state_dict_ema"`, `"state_dict"`, `"net"`, or `"bare"`.
        converted: whether the file is already what `convert_checkpoint_file` would make of it.
        file_format: `"torch"` or `"safetensors"`.
    """

    state_dict: dict[str, torch.Tensor]
    architecture: Architecture
    num_classes: int
    image_size: int
    source_key: str
    converted: bool
    file_format: str

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants the weights fit; empty where no known variant has their sizes."""
        return self.architecture.variants

    @property
    def num_parameters(self) -> int:
        """Number of parameters, position table included, rows of random features excluded."""
        return sum(tensor.numel() for key, tensor in self.state_dict.items() if not key.endswith(RANDOM_FEATURES))

    def summary(self, **more: object) -> str:
        """Facts as aligned lines of text, one each, `more` (underscores shown as spaces) at the end."""
        facts = {
            "variant": self.architecture,
            "weights from": self.source_key,
            "parameters": f"{self.num_parameters:,}",
            "image size": self.image_size,
            "classes": self.num_classes,
            **{name.replace("_", " "): value for name, value in more.items()},
        }
        width = max(map(len, facts)) + 2
        return "\n".join(f"{name:<{width}}{value}" for name, value in facts.items())


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint_file` did.

    Attributes:
        contents: what the file holds.
        path: the converted file.
        written: False where the file was converted already and nothing had to be done.
        backup: where the original is kept; None where it was left alone.
    """

    contents: CheckpointContents
    path: Path
    written: bool
    backup: Path | None


def convert_t2t_vit_state_dict(official_state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a published T2T-ViT state dict to those of `create_t2t_vit`'s models.

    `tokens_to_token.` becomes `patch_embed.` and `pos_embed` becomes `pos_embed.pe`; every other key, one that is
    converted already included, stays as it is, and so do all values.

    Args:
        official_state_dict: key to tensor.

    Returns:
        A new dict, in the same order, of the same tensors.

    Raises:
        UserError: two keys become the same one.
    """
    state_dict: dict[str, Any] = {}
    for key, value in official_state_dict.items():
        new_key = RENAMED_KEYS.get(key, key)
        for prefix, new_prefix in RENAMED_PREFIXES.items():
            if key.startswith(prefix):
                new_key = new_prefix + key.removeprefix(prefix)
        if new_key in state_dict:
            raise UserError(
                f"The state dict holds '{new_key}' twice, under its published and its converted name ('{key}'). "
                "Remove one of them, or use the published file."
            )
        state_dict[new_key] = value
    return state_dict


def unconvert_key(key: str) -> str:
    """Published key of a key of ours; the inverse of the renaming of `convert_t2t_vit_state_dict`."""
    for published, ours in RENAMED_KEYS.items():
        if key == ours:
            return published
    for published, ours in RENAMED_PREFIXES.items():
        if key.startswith(ours):
            return published + key.removeprefix(ours)
    return key


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, new_head: bool = False) -> None:
    """Load the weights of a checkpoint into a model, strictly, or leave the model as it was.

    Any format that `read_checkpoint` reads will do. Two things may differ between file and model: the position
    table, which is resized (bicubic), and the rows of random features, where the model keeps its own unless the
    file holds rows of the same shape. Weights are cast to the precision of the model.

    Args:
        model: a model of `create_t2t_vit`.
        path: the checkpoint; `~` is expanded.
        new_head: leave the file's classifier out, of whatever number of classes, and keep that of the model.

    Raises:
        UserError: the file cannot be read, is not a T2T-ViT checkpoint, or does not fit the model: the message
            names what the file holds and the option that selects it.
    """
    load_contents(model, read_checkpoint(path), path, new_head=new_head)


def load_contents(
    model: nn.Module, contents: CheckpointContents, path: str | os.PathLike[str], *, new_head: bool = False
) -> None:
    """`load_checkpoint` of a file that is read already; `path` is for messages."""
    own = model.state_dict()
    state_dict = dict(contents.state_dict)
    if new_head:
        head = [key for key in own if key.startswith(HEAD_PREFIX)]
        contents = dataclasses.replace(contents, num_classes=own[head[0]].shape[0])
        state_dict.update({key: own[key] for key in head})
    _check_architecture(model, own, contents, path)

    _settle_random_features(state_dict, own, path)

    position_table = own[POSITION_KEY]
    if state_dict[POSITION_KEY].shape[1] != position_table.shape[1]:
        logger.info(
            "%s: position table resized from %d to %d px.",
            path,
            contents.image_size,
            _image_size(position_table),
        )
        state_dict[POSITION_KEY] = resize_position_table(state_dict[POSITION_KEY].float(), position_table.shape[1] - 1)

    # Compared here, not by load_state_dict: that one copies what fits before it reports what does not.
    faults = []
    if missing := [key for key in own if key not in state_dict]:
        faults.append(f"it lacks {_name_some(missing)}")
    if unexpected := [key for key in state_dict if key not in own]:
        faults.append(f"the model has no {_name_some(unexpected)}")
    for key, tensor in state_dict.items():
        if key in own and tensor.shape != own[key].shape:
            faults.append(f"'{key}' has shape {tuple(tensor.shape)}, in the model {tuple(own[key].shape)}")
            break
    if faults:
        raise UserError(
            f"{path} does not fit the model: {'; '.join(faults)}. Use a complete checkpoint of an unmodified "
            f"{contents.architecture}."
        )
    model.load_state_dict(state_dict, strict=True)
    logger.info("Loaded %s from %s ('%s').", contents.architecture, path, contents.source_key)


def holds_random_features(contents: CheckpointContents, model: nn.Module) -> bool:
    """Whether a file holds rows for every random-feature attention of a model, which it then was trained with."""
    rows = {key: tensor.shape for key, tensor in model.state_dict().items() if key.endswith(RANDOM_FEATURES)}
    theirs = contents.state_dict
    return bool(rows) and all(key in theirs and theirs[key].shape == shape for key, shape in rows.items())


def read_checkpoint(path: str | os.PathLike[str]) -> CheckpointContents:
    """Read a T2T-ViT checkpoint of any supported format, and check it.

    Formats: files of `torch.save` (with `state_dict_ema`, `state_dict` or `net`, in this order, or bare; Lightning
    checkpoints, whose model is found under `model.`) and safetensors files; published or converted keys; with or
    without the prefix of a parallel or compiled wrapper. The format is told by content, not by name.

    Args:
        path: the file; `~` is expanded.

    Returns:
        The weights in our keys, and what they are.

    Raises:
        UserError: the file is missing, empty, cut short, a web page, a Git LFS pointer, an archive, or holds code;
            it holds no T2T-ViT; or its weights are damaged (NaN, infinite) or of a kind that is not loaded.
    """
    path = Path(path).expanduser()
    try:
        _check_is_file(path)
        checkpoint, file_format = _load_file(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}). Check its permissions and its disk."
        ) from error
    stored, source_key = _find_state_dict(checkpoint, path)
    bare = _strip_wrappers(stored, is_lightning="pytorch-lightning_version" in checkpoint)
    try:
        state_dict = convert_t2t_vit_state_dict(bare)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    _check_is_t2t_vit(state_dict, path, found=list(bare))
    _check_tensors(state_dict, path)
    table = state_dict[POSITION_KEY]
    if table.dim() != 3 or (_image_size(table) // TOTAL_STRIDE) ** 2 + 1 != table.shape[1]:
        raise UserError(
            f"{path}: the position table has shape {tuple(table.shape)}, which is not one class token and a square "
            "grid. The file is no checkpoint of an unmodified T2T-ViT; use another one."
        )
    return CheckpointContents(
        state_dict=state_dict,
        architecture=_infer_architecture(state_dict),
        num_classes=state_dict["head.weight"].shape[0],
        image_size=_image_size(table),
        source_key=source_key,
        converted=source_key == "bare" and list(stored) == list(state_dict),
        file_format=file_format,
    )


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike[str], file_format: str = "torch") -> None:
    """Write a checkpoint so that nobody ever meets half of it; a file at `path` is replaced.

    Args:
        checkpoint: state dict, or for `"torch"` a dict that holds one.
        path: where to; the folder must exist.
        file_format: `"torch"` (of `torch.save`) or `"safetensors"`.

    Raises:
        UserError: the file cannot be written, for one because the disk is full.
    """
    try:
        with atomic_write(path, "wb") as file:
            if file_format == "safetensors":
                tensors = {key: tensor.contiguous() for key, tensor in checkpoint.items()}
                file.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))
            else:
                torch.save(dict(checkpoint), file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(
            f"{path} could not be written ({str(error).partition(chr(10))[0]}). "
            "Check the free space and the permissions of its folder."
        ) from error


def convert_checkpoint_file(path: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Conversion:
    """Convert a checkpoint file to a bare state dict in our keys; the original is never lost.

    In place, the original is first kept under `<path>.og`, then the converted file takes its name in one step; cut
    off at any moment, the original exists whole under one of the two names, and converting again carries on. A
    safetensors file stays one.

    Args:
        path: the file; `~` is expanded.
        output: where the converted file goes, as safetensors if its name ends so; None converts in place. `path`
            is left alone if it is given.

    Returns:
        What was found and done.

    Raises:
        UserError: the file cannot be read or written, `output` exists, or another file has the backup's name.
    """
    path = Path(path).expanduser()
    if output is not None:
        output = Path(output).expanduser()
        if os.path.lexists(output):
            raise UserError(f"{output} exists and is not overwritten. Move it or choose another output.")
        contents = read_checkpoint(path)
        file_format = "safetensors" if output.suffix == ".safetensors" else "torch"
        save_checkpoint(contents.state_dict, output, file_format)
        return Conversion(contents, output, written=True, backup=None)

    contents = read_checkpoint(path)
    if contents.converted:
        return Conversion(contents, path, written=False, backup=None)
    if path.suffix == BACKUP_SUFFIX:
        raise UserError(
            f"{path} is the original that an earlier conversion kept. "
            "Convert it to another name with --output, or rename it first."
        )
    backup = path.with_name(path.name + BACKUP_SUFFIX)
    _back_up(path, backup)
    save_checkpoint(contents.state_dict, path, contents.file_format)
    return Conversion(contents, path, written=True, backup=backup)


def export_checkpoint_file(
    path: str | os.PathLike[str], output: str | os.PathLike[str], *, half: bool = False
) -> CheckpointContents:
    """Write the weights of a checkpoint of any format as the published files have them, for others to use.

    Optimizer, history and rows of random features stay behind: a few megabytes of weights are left.

    Args:
        path: the checkpoint; `~` is expanded.
        output: where to; its folder must exist.
        half: round the weights to float16.

    Returns:
        What `path` holds.

    Raises:
        UserError: the file cannot be read or written, `output` exists, or a weight is too large for float16.
    """
    output = Path(output).expanduser()
    if os.path.lexists(output):
        raise UserError(f"{output} exists and is not overwritten. Move it or choose another output.")
    contents = read_checkpoint(path)
    state_dict = {}
    for key, tensor in contents.state_dict.items():
        if key.endswith(RANDOM_FEATURES):
            continue
        tensor = tensor.half() if half else tensor
        if not torch.isfinite(tensor).all():
            raise UserError(f"'{key}' of {path} is too large for half precision. Leave out --half.")
        state_dict[unconvert_key(key)] = tensor
    save_checkpoint({"state_dict_ema": state_dict}, output)
    return contents


def _back_up(path: Path, backup: Path) -> None:
    """Keep `path` under the name `backup` as well; a file that is there already must be the same."""
    if os.path.lexists(backup):
        # The same content is what a conversion that was cut off leaves behind.
        if backup.is_file() and sha256_of_file(backup) == sha256_of_file(path):
            return
        raise UserError(
            f"{path} is not converted, but its backup {backup} exists and is another file; it is not overwritten. "
            "Move the backup away, or convert to another name with --output."
        )
    if not path.is_symlink():  # a link to a link would point at the converted file afterwards
        try:
            # A second name for the same bytes: in one step, and it fails if the name is taken meanwhile.
            os.link(path, backup)
            return
        except FileExistsError:
            raise UserError(f"{backup} has just been made by another process. Try again.") from None
        except OSError:
            logger.debug("%s: no hard links here, copying.", path)
    try:
        with open(path, "rb") as source, atomic_write(backup, "wb") as target:
            shutil.copyfileobj(source, target)
    except OSError as error:
        raise UserError(
            f"{path} could not be copied to {backup} ({error.strerror}). "
            "Check the free space and the permissions of its folder."
        ) from error
    shutil.copystat(path, backup)


def _check_is_file(path: Path) -> None:
    """Raise a UserError unless `path` is a file with something in it."""
    if path.is_dir():
        files = sorted(entry.name for entry in path.iterdir() if entry.is_file())
        inside = f", such as {path / files[0]}" if files else ""
        raise UserError(f"{path} is a folder, not a checkpoint. Name a file in it{inside}.")
    if not path.exists():
        raise UserError(f"Checkpoint {path} does not exist. {_where_it_could_be(path)}")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file. Name a checkpoint file.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: its download or copy failed. Download it again.")


def _where_it_could_be(path: Path) -> str:
    """Remedies for a checkpoint that is not there."""
    if not path.parent.is_dir():
        return f"The folder {path.parent.absolute()} does not exist either; check the path."
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=3)
    if near:
        return f"Did you mean {' or '.join(str(path.with_name(name)) for name in near)}?"
    for name, published in PUBLISHED_CHECKPOINTS.items():
        if published.file_name == path.name:
            return f"Fetch it: python scripts/download_checkpoint_t2t_vit.py {name}"
    return f"Check the path; the folder {path.parent.absolute()} holds no file of a similar name."


def _load_file(path: Path) -> tuple[Any, str]:
    """Content of a file and its format, `"torch"` or `"safetensors"`; nothing in it is run."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(1024)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<body", b"<?xml")):
        raise UserError(
            f"{path} is a web page, not a checkpoint: the link that was followed leads to a page. Download it again "
            "from the file's direct address (scripts/download_checkpoint_t2t_vit.py does)."
        )
    if text.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer, not the checkpoint itself. Run 'git lfs pull' in its repository, or "
            "download the file."
        )
    is_torch = head.startswith((b"PK\x03\x04", b"\x80"))  # a zip archive, or the pickle of older versions
    # First: the length of the header, 8 bytes, can begin like a pickle.
    if head[5:9] == b"\0\0\0{" or (path.suffix == ".safetensors" and not is_torch):
        return _load_safetensors(path, size), "safetensors"
    if head[257:262] == b"ustar":
        raise UserError(
            f"{path} is a tar archive. Unpack it (tar -xf {path.name}) and name the checkpoint in it; the "
            "published .pth.tar files are no archives and are used as they are."
        )
    try:
        # Training runs of timm keep their options as a Namespace, which is plain data. Opened here because
        # torch.load takes a path that ends in .safetensors for what its name says.
        with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True), "torch"
    except Exception as error:  # damaged bytes can make the reader fail in any way, OSError included
        # How the reader words it when a pickle asks for a function or class that is not plain data.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise UserError(
                f"{path} contains code ({refused[1]}), which was not run. Get the checkpoint from a source "
                "you trust, saved as weights alone: torch.save(model.state_dict(), ...)."
            ) from error
        if is_torch:
            raise UserError(
                f"{path} ({size:,} bytes) is cut short or damaged, or not a file of torch.save. Download it again "
                "and compare the sizes."
            ) from error
        raise UserError(
            f"{path} is not a checkpoint: neither a file of torch.save nor a safetensors file. Check the path."
        ) from error


def _load_safetensors(path: Path, size: int) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file."""
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path} ({size:,} bytes) is cut short or damaged, or not a safetensors file ({error}). "
            "Download it again and compare the sizes."
        ) from error


def _find_state_dict(checkpoint: Any, path: Path) -> tuple[Mapping[str, Any], str]:
    """The state dict in what a file holds, and the key it is under, `"bare"` if it is all there is."""
    if not isinstance(checkpoint, Mapping):
        raise UserError(
            f"{path} holds a {type(checkpoint).__name__}, not a state dict. "
            "Save one: torch.save(model.state_dict(), ...)."
        )
    # An EMA that was switched off may be stored as None or as an empty dict.
    found = [key for key in STATE_DICT_KEYS if isinstance(checkpoint.get(key), Mapping) and checkpoint[key]]
    if found:
        if len(found) > 1:
            logger.info("%s: '%s' is used, '%s' is not.", path, found[0], "', '".join(found[1:]))
        return checkpoint[found[0]], found[0]
    if not checkpoint or any(key in checkpoint for key in STATE_DICT_KEYS):
        raise UserError(f"{path} holds no weights: its state dict is empty. Use another checkpoint.")
    return checkpoint, "bare"


def _strip_wrappers(state_dict: Mapping[str, Any], is_lightning: bool) -> dict[str, Any]:
    """State dict without the prefixes that wrappers put before every key."""
    state_dict = {str(key): value for key, value in state_dict.items()}
    if is_lightning:
        # What is outside `model.` belongs to the task (loss, metrics), not to the network.
        network = {key: value for key, value in state_dict.items() if key.startswith(LIGHTNING_PREFIX)}
        state_dict = {key.removeprefix(LIGHTNING_PREFIX): value for key, value in network.items()} or state_dict
    while state_dict:
        shared = [prefix for prefix in WRAPPER_PREFIXES if all(key.startswith(prefix) for key in state_dict)]
        if not shared:
            break
        state_dict = {key.removeprefix(shared[0]): value for key, value in state_dict.items()}
    return state_dict


def _check_is_t2t_vit(state_dict: Mapping[str, Any], path: Path, found: list[str]) -> None:
    """Raise a UserError unless the tensors that tell the variant are there; `found` are the keys as in the file."""
    # Other vision transformers have most of the telltale keys, but no token stages.
    if not any(key.startswith(TOKEN_STAGE_PREFIX) for key in state_dict):
        raise UserError(
            f"{path} is not a T2T-ViT checkpoint: it holds {_name_some(found)}. "
            "Use a checkpoint of T2T-ViT (scripts/download_checkpoint_t2t_vit.py fetches the published ones)."
        )
    missing = [
        key for key in TELLTALE_KEYS if not isinstance(state_dict.get(key), torch.Tensor) or state_dict[key].dim() < 2
    ]
    if missing:
        raise UserError(
            f"{path} is not a complete T2T-ViT checkpoint: it lacks {_name_some(missing)}. "
            "Use a checkpoint that holds the whole state dict."
        )


def _check_tensors(state_dict: Mapping[str, Any], path: Path) -> None:
    """Raise a UserError if any value is no tensor of finite real floating-point numbers."""
    for key, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{path}: '{key}' is a {type(tensor).__name__}, not a tensor. "
                "Save the state dict alone: torch.save(model.state_dict(), ...)."
            )
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(
                f"{path}: '{key}' is a tensor of {tensor.dtype} on {tensor.device} with layout {tensor.layout}; "
                "weights are dense floating-point tensors. Use an unquantised checkpoint."
            )
        # Cast because narrow formats have no isfinite of their own.
        if not torch.isfinite(tensor.float()).all():
            raise UserError(
                f"{path} is corrupted: '{key}' holds NaN or infinite values. Use another checkpoint, or download this "
                "one again."
            )


def _infer_architecture(state_dict: Mapping[str, torch.Tensor]) -> Architecture:
    """Sizes of the network of a state dict in our keys that holds the telltale ones."""
    # The highest number, not their count: a file that lacks a block is incomplete, not shallower.
    blocks = (re.match(r"blocks\.(\d+)\.", key) for key in state_dict)
    return Architecture(
        tokens="performer" if TOKEN_STAGE_PREFIX + "w" in state_dict else "transformer",
        embed_dim=state_dict["cls_token"].shape[-1],
        depth=1 + max(int(match[1]) for match in blocks if match),
        mlp_dim=state_dict["blocks.0.mlp.fc1.weight"].shape[0],
    )


def _image_size(position_table: torch.Tensor) -> int:
    """Height and width in pixels of the images that a position table (1, 1 + N, dim) is for."""
    return TOTAL_STRIDE * math.isqrt(max(position_table.shape[1] - 1, 0))


def _check_architecture(
    model: nn.Module,
    own: Mapping[str, torch.Tensor],
    contents: CheckpointContents,
    path: str | os.PathLike[str],
) -> None:
    """Raise a UserError that names the options if variant or number of classes of file and model differ."""
    if any(key not in own for key in TELLTALE_KEYS):
        raise UserError(
            f"{type(model).__name__} is not a T2T-ViT, so {path} cannot be loaded into it. Build the model with "
            "create_t2t_vit."
        )
    theirs, ours = contents.architecture, _infer_architecture(own)
    held, wanted, options = [], [], []
    if theirs != ours:
        held.append(str(theirs))
        wanted.append(_model_name(model, ours))
        options.append(" or ".join(f"model/t2tmodel={name}" for name in theirs.variants))
    num_classes = own["head.weight"].shape[0]
    if contents.num_classes != num_classes:
        held.append(_count_classes(contents.num_classes))
        wanted.append(_count_classes(num_classes))
        options.append(f"model.num_classes={contents.num_classes}")
    if not held:
        return
    remedy = f"use {' '.join(options)}"
    if theirs != ours and not theirs.variants:
        remedy = f"use a checkpoint of one of: {', '.join(T2T_VIT_VARIANTS)}"
    raise UserError(
        f"{path} holds {' with '.join(held)}, but the model is {' with '.join(wanted)}; {remedy}."
        if theirs != ours
        else f"{path} has {held[0]}, but the model has {wanted[0]}; {remedy}."
    )


def _count_classes(number: int) -> str:
    """`5 classes`, in words."""
    return f"{number} class{'' if number == 1 else 'es'}"


def _model_name(model: nn.Module, architecture: Architecture) -> str:
    """Name of a model: unlike a file, it knows its heads, which settle what its shapes leave open."""
    heads = model.blocks[0].attn.num_heads
    exact = [name for name in architecture.variants if T2T_VIT_VARIANTS[name].num_heads == heads]
    return exact[0] if exact else str(architecture)


def _settle_random_features(
    state_dict: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor], path: str | os.PathLike[str]
) -> None:
    """Let rows of random features be those of the file where they fit, those of the model elsewhere, in place."""
    for key in [key for key in state_dict if key.endswith(RANDOM_FEATURES)]:
        if key not in own or own[key].shape != state_dict[key].shape:
            logger.info("%s: '%s' does not fit the attention of the model and is ignored.", path, key)
            del state_dict[key]
    for key in own:
        if key.endswith(RANDOM_FEATURES) and key not in state_dict:
            logger.debug("%s: no '%s', the model keeps its own draw.", path, key)
            state_dict[key] = own[key]


def _name_some(keys: Iterable[str], limit: int = 3) -> str:
    """A few keys in quotes, and how many more there are."""
    keys = list(keys)
    names = ", ".join(f"'{key}'" for key in keys[:limit]) or "nothing"
    return names if len(keys) <= limit else f"{names} and {len(keys) - limit} more"
