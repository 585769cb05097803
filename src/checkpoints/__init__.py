"""T2T-ViT checkpoints: reading, conversion, loading into a model, writing.

A checkpoint comes in many wrappings: `{"state_dict_ema": ...}` as published, `{"state_dict": ...}` of a training run,
a bare state dict, a Lightning checkpoint, safetensors; with or without the prefixes of wrappers. All of
them are reduced to one state dict in the keys of `create_t2t_vit`'s models. No code in a file is ever run.
"""

from src.checkpoints.conversion import convert_t2t_vit_state_dict, unconvert_key
from src.checkpoints.loading import holds_random_features, load_checkpoint, load_contents
from src.checkpoints.published import PUBLISHED_CHECKPOINTS, PUBLISHED_URL, PublishedCheckpoint
from src.checkpoints.reading import CheckpointContents, read_checkpoint
from src.checkpoints.writing import Conversion, convert_checkpoint_file, export_checkpoint_file, save_checkpoint

__all__ = [
    "PUBLISHED_CHECKPOINTS",
    "PUBLISHED_URL",
    "CheckpointContents",
    "Conversion",
    "PublishedCheckpoint",
    "convert_checkpoint_file",
    "convert_t2t_vit_state_dict",
    "export_checkpoint_file",
    "holds_random_features",
    "load_checkpoint",
    "load_contents",
    "read_checkpoint",
    "save_checkpoint",
    "unconvert_key",
]
