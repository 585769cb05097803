"""Records of every image of an evaluation, and the metrics computed from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from scatterbrain.errors import UserError
from src.utils.labels import NO_LABEL

MAX_PREDICTIONS = 5


def _numpy(values: ArrayLike | torch.Tensor, dtype: type) -> NDArray[Any]:
    if isinstance(values, torch.Tensor):
        # NumPy has no bfloat16, and every float is to be a double anyway.
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    array = np.asarray(values)
    if dtype is np.int64 and array.dtype.kind not in "iu":
        raise ValueError(f"Records: targets and classes must be integers, got {array.dtype}")
    return array.astype(dtype)


@dataclass(eq=False)
class Records:
    """Records of an evaluation: N images under K seeds. Tensors and arrays are accepted, arrays are kept.

    Args:
        targets: (N,) output index of the right class; all `NO_LABEL` where the images have no labels.
        top5_classes: (K, N, P) output indices, most probable first, P = min(5, number of classes).
        top5_probabilities: (K, N, P) their softmax probabilities.
        losses: (K, N) cross-entropy of each image, nats; without labels of no meaning.

    Raises:
        ValueError: the shapes do not fit each other, or the indices are not integers.
        UserError: there are no images.
    """

    targets: NDArray[np.int64]
    top5_classes: NDArray[np.int64]
    top5_probabilities: NDArray[np.float64]
    losses: NDArray[np.float64]

    def __post_init__(self) -> None:
        self.targets = _numpy(self.targets, np.int64)
        self.top5_classes = _numpy(self.top5_classes, np.int64)
        self.top5_probabilities = _numpy(self.top5_probabilities, np.float64)
        self.losses = _numpy(self.losses, np.float64)
        shapes = [array.shape for array in (self.targets, self.top5_classes, self.top5_probabilities)]
        shapes.append(self.losses.shape)
        expected = "targets (N,), top5_classes and top5_probabilities (K, N, P), losses (K, N)"
        if [len(shape) for shape in shapes] != [1, 3, 3, 2]:
            raise ValueError(f"Records: expected {expected}, got {shapes}")
        seeds, _, width = shapes[1]
        images = shapes[0][0]
        if shapes[1:] != [(seeds, images, width), (seeds, images, width), (seeds, images)]:
            raise ValueError(f"Records: expected {expected}, got {shapes}")
        if seeds == 0 or not 1 <= width <= MAX_PREDICTIONS:
            raise ValueError(f"Records: expected K >= 1 and 1 <= P <= {MAX_PREDICTIONS}, got {shapes[1]}")
        if images == 0:
            raise UserError("The evaluation saw no images. Check the data folder, the split and any batch limit.")


def summarise(records: Records) -> dict[str, Any]:
    """The metrics of an evaluation, computed in double precision.

    Args:
        records: of every image.

    Returns:
        The fields `top1`, `top5`, `loss`, `top1_per_seed` and `top1_std` of `Results`. With fewer than five
        classes every class is among the first five, and `top5` is 100. `top1_std` divides by K - 1; one seed
        has no standard deviation, and it is None. Without labels `top1_per_seed` is empty and the others are None.
    """
    if (records.targets == NO_LABEL).any():
        return {"top1": None, "top5": None, "loss": None, "top1_per_seed": [], "top1_std": None}
    hits = records.top5_classes == records.targets[None, :, None]  # [K, N, P]
    top1_per_seed = 100.0 * hits[:, :, 0].mean(axis=1, dtype=np.float64)
    top5_per_seed = 100.0 * hits.any(axis=2).mean(axis=1, dtype=np.float64)
    return {
        "top1": float(top1_per_seed.mean()),
        "top5": float(top5_per_seed.mean()),
        "loss": float(records.losses.mean(dtype=np.float64)),
        "top1_per_seed": [float(value) for value in top1_per_seed],
        "top1_std": float(top1_per_seed.std(ddof=1)) if len(top1_per_seed) > 1 else None,
    }
