"""The implementations of a T2T-ViT that the network benchmark compares, and the images they get."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import nn

from src.models.inference import inference_model
from src.models.modules.transformer_block import SelfAttention
from src.models.t2t_vit import T2TViT, create_t2t_vit
from src.utils.static_shapes import CudaGraphForward, compiled

# As --implementations names them; the baseline is timm's, of about the same size.
KINDS = ("published", "module", "inference", "baseline")
BASELINE = "vit_small_patch16_224"
PRECISIONS = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
}
SEED = 0

Forward = Callable[[torch.Tensor], torch.Tensor]


class PublishedTokenAttention(nn.Module):
    """Full attention of a token stage as published: the N x N matrix of weights is there in full."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Attend: three (B, N, H, E) to one."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        weights = ((query * self.scale) @ key.transpose(-2, -1)).softmax(-1)
        return (weights @ value).transpose(1, 2), None


class PublishedSelfAttention(nn.Module):
    """Attention of a backbone block as published, in evaluation, with the weights of ours."""

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N, dim) to (B, N, dim)."""
        batch, length, dim = x.shape
        width = dim // self.num_heads
        query, key, value = self.qkv(x).reshape(batch, length, 3, self.num_heads, width).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * width**-0.5).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, length, dim))


def as_published(model: T2TViT) -> T2TViT:
    """A T2T-ViT of full attention that computes as the published code does, from the same weights.

    The rest of it does so already: unfolded patches, LayerNorm, and a linear map, one after the other.
    """
    for stage in (model.patch_embed.attention1, model.patch_embed.attention2):
        stage.attn.attention = PublishedTokenAttention(stage.attn.attention.softmax_temp)
    for block in model.blocks:
        block.attn = PublishedSelfAttention(block.attn)
    return model


@dataclass(frozen=True)
class Implementation:
    """One way to run a network: one of `KINDS`, and the attention of the token stages where there is a choice.

    It may be compiled by `torch.compile` and recorded as a CUDA graph.
    """

    kind: str
    attention: str | None = None
    compiled: bool = False
    graph: bool = False

    @property
    def name(self) -> str:
        """Its row in the table."""
        first = f"timm {BASELINE}" if self.kind == "baseline" else " ".join(filter(None, (self.kind, self.attention)))
        return ", ".join([first] + ["compiled"] * self.compiled + ["CUDA graph"] * self.graph)

    def images(self, batch: int, arguments: argparse.Namespace, device: torch.device) -> torch.Tensor:
        """Normal images (batch, 3, size, size), the same in each run; channels last for inference."""
        generator = torch.Generator(device).manual_seed(SEED)
        shape = (batch, 3, arguments.image_size, arguments.image_size)
        images = torch.randn(shape, generator=generator, device=device).to(PRECISIONS[arguments.precision])
        return images.contiguous(memory_format=torch.channels_last) if self.kind == "inference" else images

    def network(self, arguments: argparse.Namespace) -> nn.Module:
        """The network as a module, with weights that are the same for all but the baseline."""
        torch.manual_seed(SEED)
        size, num_classes = arguments.image_size, arguments.num_classes
        if self.kind == "baseline":
            return timm.create_model(BASELINE, img_size=size, num_classes=num_classes).eval()
        stage = {"name": "full"}
        if self.attention is not None:
            stage = {"name": self.attention, "memory_fraction": arguments.memory_fraction}
        return create_t2t_vit(arguments.variant, [stage, stage], size, num_classes, seed=SEED).eval()


def choose(arguments: argparse.Namespace, device: torch.device) -> list[Implementation]:
    """The implementations that the options name, in the order of the table."""
    on_cuda = device.type == "cuda"
    found = []
    for kind in arguments.implementations:
        for attention in arguments.attentions if kind in ("module", "inference") else (None,):
            found.append(Implementation(kind, attention, graph=on_cuda and kind == "inference"))
            if arguments.compile:
                if kind == "published" and on_cuda:
                    found.append(Implementation(kind, attention, compiled=True))
                found.append(Implementation(kind, attention, compiled=True, graph=on_cuda))
    return found


def build(implementation: Implementation, arguments: argparse.Namespace, device: torch.device) -> Forward:
    """An implementation on the device, from images (B, 3, size, size) to logits (B, num_classes)."""
    network = implementation.network(arguments)
    if implementation.kind == "published":
        network = as_published(network)
    network = network.to(device, PRECISIONS[arguments.precision])
    if implementation.kind == "inference":
        network = inference_model(network)
    call = compiled(network) if implementation.compiled else network
    call = CudaGraphForward(call) if implementation.graph else call
    return torch.autocast(device.type, torch.bfloat16)(call) if arguments.precision.endswith("mixed") else call
