"""Checks of options that every mode takes and no other part checks."""

from __future__ import annotations

from omegaconf import DictConfig

from scatterbrain.errors import check_whole_number

# The largest seed of `seed_everything`, less room for the seeds of further samples.
MAX_SEED = 2**31 - 1


def check_common_options(config: DictConfig) -> None:
    """Check `seed` and the sizes of the model, before anything slow.

    Raises:
        UserError: a value that is not valid.
    """
    check_whole_number("seed", config.seed, 0, MAX_SEED)
    # the data module reads these two through its own options, and would name those
    check_whole_number("model.image_size", config.model.image_size, 1)
    check_whole_number("model.num_classes", config.model.num_classes, 1)
