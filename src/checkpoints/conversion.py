"""Published state dict keys to those of `create_t2t_vit`'s models, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scatterbrain.errors import UserError

# Published prefix to ours.
RENAMED_PREFIXES = {"tokens_to_token.": "patch_embed."}
# Published key to ours.
RENAMED_KEYS = {"pos_embed": "pos_embed.pe"}


def convert_t2t_vit_state_dict(official_state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a published T2T-ViT state dict to those of `create_t2t_vit`'s models.

    `tokens_to_token.` becomes `patch_embed.` and `pos_embed` becomes `pos_embed.pe`. All other keys (also those that
    are already converted) and all values stay the same.

    Args:
        official_state_dict: key to tensor.

    Returns:
        A new dict, in the same order, of the same tensors.

    Raises:
        UserError: two keys map to the same name.
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
    """Published name of one of our keys: the inverse of `convert_t2t_vit_state_dict`."""
    for published, ours in RENAMED_KEYS.items():
        if key == ours:
            return published
    for published, ours in RENAMED_PREFIXES.items():
        if key.startswith(ours):
            return published + key.removeprefix(ours)
    return key
