"""`convert_t2t_vit_state_dict` and `load_checkpoint` at their first address; they live in `src.checkpoints`."""

from src.checkpoints import convert_t2t_vit_state_dict, load_checkpoint

__all__ = ["convert_t2t_vit_state_dict", "load_checkpoint"]
