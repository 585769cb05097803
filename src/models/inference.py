"""T2T-ViT for inference: the same weights and results, fewer passes over memory.

Differences from `T2TViT.forward`: a soft split, its LayerNorm and the first linear layer are one operator that never
materialises patches; every other LayerNorm is folded into the following linear layer; GELU and residuals are fused into
the linear layers; everything after the attention of a token stage is one operator; and the last block computes only the
class token, which is all that the head reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from scatterbrain.errors import UserError
from scatterbrain.ops.performer import performer_attention
from src.models.modules.token_stage import TokenPerformer, TokenTransformer
from src.models.modules.tokens_to_token import SOFT_SPLITS
from src.models.modules.transformer_block import Block
from src.models.ops.fused_linear import FoldedLinear, Patches, fused_linear, fused_linear_with_statistics
from src.models.ops.token_tail import FoldedTail, token_tail
from src.models.t2t_vit import T2TViT

# On a CPU the token stages process this many pixels at a time (4 images of 224 pixels): the allocator reuses memory for
# their tensors, 2.4 MB per image, while tensors of 16 images would be mapped and cleared for each operation.
PIXELS_PER_CHUNK = 4 * 224**2


def inference_model(model: T2TViT, backend: str = "auto") -> InferenceT2TViT:
    """Build the inference model of a model in eval mode.

    It shares the token stages' attention modules with the model: changes of `projection_matrix` affect both. All other
    weights are folded copies, in the model's dtype and on its device, so a model that is moved, cast, trained or loaded
    into afterwards needs a new inference model.

    Args:
        model: the model, in eval mode, on its final device and in its final dtype.
        backend: of the fused operators: `torch`, `triton` or `auto`, see `scatterbrain.ops.common.backends`. The
            attention modules have their own.

    Returns:
        Module (B, 3, image_size, image_size) -> (B, num_classes), for inference only. Images in channels-last memory
        (`images.to(memory_format=torch.channels_last)`) are read without a copy.

    Raises:
        UserError: the model is in training mode, or its parameters differ in dtype or device.
    """
    return InferenceT2TViT(model, backend)


class InferenceT2TViT(nn.Module):
    """See `inference_model`."""

    def __init__(self, model: T2TViT, backend: str = "auto") -> None:
        super().__init__()
        if model.training:
            raise UserError("The model is in training mode, and its inference model has no dropout. Call model.eval().")
        kinds = {(parameter.dtype, parameter.device) for parameter in model.parameters()}
        if len(kinds) > 1:
            raise UserError(
                f"The model's parameters are of several dtypes or devices, {sorted(map(str, kinds))}. Convert it to "
                "one first, by model.to(dtype=..., device=...)."
            )
        self.backend = backend
        self.image_size = model.image_size
        self.num_classes = model.num_classes
        tokens = model.patch_embed
        self.stages = nn.ModuleList(
            _STAGES[type(stage)](stage, Patches(*split), backend)
            for stage, split in zip((tokens.attention1, tokens.attention2), SOFT_SPLITS[:2], strict=True)
        )
        self.project = FoldedLinear(tokens.project.weight, tokens.project.bias, patches=Patches(*SOFT_SPLITS[2]))
        with torch.no_grad():
            table = model.pos_embed.pe.detach()[0]
            self.register_buffer("class_token", (model.cls_token.detach()[0, 0] + table[0]).clone())
            self.register_buffer("positions", table[1:].clone())
        blocks = list(model.blocks)
        self.blocks = nn.ModuleList(_Block(block, backend) for block in blocks[:-1])
        self.last_block = _LastBlock(blocks[-1], backend)
        self.head = FoldedLinear(model.head.weight, model.head.bias, model.norm)
        self.eval()

    def train(self, mode: bool = True) -> InferenceT2TViT:
        """Stay in eval mode.

        Raises:
            UserError: training mode is requested.
        """
        if mode:
            raise UserError("The inference model cannot be trained. Train the model, then build another one.")
        return super().train(False)

    def forward_tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, image_size, image_size) to the backbone's input (B, 1 + patches, dim)."""
        expected = (3, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise UserError(
                f"The model takes images of shape (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}. "
                "Build it with image_size=... for another size."
            )
        if torch.is_autocast_enabled(images.device.type):
            raise UserError(
                "The inference model computes in the dtype of its weights, and autocast is on. Convert the model and "
                "the images instead, or call the model itself."
            )
        batch, size = len(images), self.image_size
        tokens = images.new_empty(batch, 1 + len(self.positions), len(self.class_token))
        tokens[:, 0] = self.class_token
        chunk_size = max(batch, 1)
        if images.device.type == "cpu" and not torch.compiler.is_compiling():
            chunk_size = max(1, PIXELS_PER_CHUNK // size**2)
        for chunk_images, chunk_tokens in zip(images.split(chunk_size), tokens.split(chunk_size), strict=True):
            x = chunk_images.permute(0, 2, 3, 1)
            for stage, reduction in zip(self.stages, (4, 8), strict=True):
                x = stage(x).view(len(x), size // reduction, size // reduction, -1)
            fused_linear(x, self.project, self.positions, chunk_tokens[:, 1:], self.backend)
        return tokens

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, image_size, image_size) to logits (B, num_classes).

        Raises:
            UserError: images of another size, dtype or device; gradients are required; autocast is on.
        """
        x = self.forward_tokens(images)
        statistics = None
        for block in self.blocks:
            x, statistics = block(x, statistics)
        return fused_linear(self.last_block(x, statistics), self.head, backend=self.backend)


class _TransformerStage(nn.Module):
    """A soft split and the following `TokenTransformer`, whose attention module is shared."""

    def __init__(self, stage: TokenTransformer, patches: Patches, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.attention = stage.attn.attention
        self.qkv = FoldedLinear(stage.attn.qkv.weight, stage.attn.qkv.bias, stage.norm1, patches=patches)
        self.tail = FoldedTail(stage.attn.proj, stage.norm2, stage.mlp.fc1, stage.mlp.fc2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a feature map (B, height, width, C) to tokens (B, patches, token_dim)."""
        qkv = fused_linear(x, self.qkv, backend=self.backend)
        query, key, value = qkv.unflatten(-1, (3, 1, -1)).unbind(2)  # (B, N, 1, E) views
        out, _ = self.attention(query, key, value)
        return token_tail(out.squeeze(2), value.squeeze(2), self.tail, backend=self.backend)


class _PerformerStage(nn.Module):
    """A soft split and the following `TokenPerformer`."""

    def __init__(self, stage: TokenPerformer, patches: Patches, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.kqv = FoldedLinear(stage.kqv.weight, stage.kqv.bias, stage.norm1, patches=patches)
        self.tail = FoldedTail(stage.proj, stage.norm2, stage.mlp[0], stage.mlp[2])
        self.eps = stage.NORMALISER_EPS
        self.register_buffer("projection", stage.w.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map a feature map (B, height, width, C) to tokens (B, patches, token_dim)."""
        kqv = fused_linear(x, self.kqv, backend=self.backend)
        key, query, value = kqv.unflatten(-1, (3, -1)).unsqueeze(1).unbind(3)  # (B, 1, N, E) views
        out = performer_attention(query, key, value, self.projection, scale=1.0, eps=self.eps)
        return token_tail(out.squeeze(1), value.squeeze(1), self.tail, backend=self.backend)


_STAGES: dict[type[nn.Module], type[nn.Module]] = {
    TokenTransformer: _TransformerStage,
    TokenPerformer: _PerformerStage,
}


class _Block(nn.Module):
    """A backbone block."""

    def __init__(self, block: Block, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.num_heads = block.attn.num_heads
        self.qkv = FoldedLinear(block.attn.qkv.weight, block.attn.qkv.bias, block.norm1)
        self.proj = FoldedLinear(block.attn.proj.weight, block.attn.proj.bias)
        self.fc1 = FoldedLinear(block.mlp.fc1.weight, block.mlp.fc1.bias, block.norm2, gelu=True)
        self.fc2 = FoldedLinear(block.mlp.fc2.weight, block.mlp.fc2.bias)

    def forward(
        self, x: torch.Tensor, statistics: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map tokens (B, N, dim) and their `statistics` to the same, see `fused_linear_with_statistics`."""
        qkv = fused_linear(x, self.qkv, backend=self.backend, statistics=statistics)
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x, statistics = fused_linear_with_statistics(out, self.proj, x, self.backend)
        hidden = fused_linear(x, self.fc1, backend=self.backend, statistics=statistics)
        return fused_linear_with_statistics(hidden, self.fc2, x, self.backend)


class _LastBlock(nn.Module):
    """The last block for the class token: keys and values of all tokens, everything else of the first token only."""

    def __init__(self, block: Block, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.num_heads = block.attn.num_heads
        weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
        dim = weight.shape[1]
        queries, keys_and_values = (slice(None, dim), slice(dim, None))
        self.query = FoldedLinear(weight[queries], None if bias is None else bias[queries], block.norm1)
        self.key_value = FoldedLinear(
            weight[keys_and_values], None if bias is None else bias[keys_and_values], block.norm1
        )
        self.proj = FoldedLinear(block.attn.proj.weight, block.attn.proj.bias)
        self.fc1 = FoldedLinear(block.mlp.fc1.weight, block.mlp.fc1.bias, block.norm2, gelu=True)
        self.fc2 = FoldedLinear(block.mlp.fc2.weight, block.mlp.fc2.bias)

    def forward(self, x: torch.Tensor, statistics: torch.Tensor | None = None) -> torch.Tensor:
        """Map tokens (B, N, dim) to the class token (B, dim)."""
        key_value = fused_linear(x, self.key_value, backend=self.backend, statistics=statistics)
        key, value = key_value.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x[:, 0]
        query = fused_linear(x, self.query, backend=self.backend).unflatten(-1, (self.num_heads, 1, -1))  # (B, H, 1, E)
        out = F.scaled_dot_product_attention(query, key, value).flatten(1)
        x = fused_linear(out, self.proj, x, backend=self.backend)
        hidden = fused_linear(x, self.fc1, backend=self.backend)
        return fused_linear(hidden, self.fc2, x, backend=self.backend)
