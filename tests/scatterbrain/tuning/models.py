"""Small models with random weights, whose queries and keys are large enough for peaked attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

LENGTH, WIDTH, HEADS = 64, 32, 2


class Layer(nn.Module):
    """Self-attention with `num_calls` calls of scaled_dot_product_attention."""

    def __init__(self, num_calls: int = 1, **options) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.num_calls, self.options = num_calls, options

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        for _ in range(self.num_calls):
            out = F.scaled_dot_product_attention(*self.heads(x), **self.options, **kwargs)
            x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x


class Outer(nn.Module):
    """Attention before and after a module with attention of its own, so that the calls interleave."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.own = Layer(), Layer()

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        out = F.scaled_dot_product_attention(*self.own.heads(x))
        return x + self.own.proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(self.inner(self.attend(x)))


def grown(model: nn.Module, size: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def network(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return grown(nn.Sequential(*(layers or (Layer(), nn.GELU(), Layer()))))


def inputs(batch: int = 2, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))
