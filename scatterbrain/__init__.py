"""Approximate attention for pre-trained transformers: Scatterbrain and its family, drop-in and without training.

>>> import torch, scatterbrain
>>> query = key = value = torch.randn(1, 8, 3136, 64)               # (B, H, T, E)
>>> projection = scatterbrain.draw_projection(12, 64, seed=0)       # 12 random projections, 24 features
>>> scatterbrain.scatterbrain_attention(query, key, value, projection, window=49).shape
torch.Size([1, 8, 3136, 64])

Functions take (B, H, length, width) as `torch.nn.functional.scaled_dot_product_attention` does; modules, which
`create_attention` sizes to a memory budget, take (B, length, H, width). Needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from scatterbrain.version import __version__ as __version__

if TYPE_CHECKING:
    from scatterbrain._exports import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """A public name, imported on first use: programs that need `scatterbrain.errors` alone start without torch."""
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    exports = importlib.import_module("scatterbrain._exports")
    if name == "__all__":
        return sorted([*exports.__all__, "__version__"])
    if name not in exports.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(exports, name)


def __dir__() -> list[str]:
    return __getattr__("__all__")
