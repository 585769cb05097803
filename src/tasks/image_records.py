"""Loss and predictions of every image, exact on any number of ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torchmetrics import Metric

from src.evaluation.records import MAX_PREDICTIONS, Records
from src.utils.labels import NO_LABEL

_PER_SEED = ("top5_classes", "top5_probabilities", "losses")


class ImageRecords(Metric):
    """Loss and best classes of each image under each seed of the random features.

    Each rank fills the rows of its own images; the sum over ranks is the whole table. A row filled twice, or never,
    shows in `count`, so that no result can come from a wrong number of images.

    Args:
        num_images: number of images N, over all ranks.
        num_classes: number of classes.
        num_seeds: number of seeds K, 1 by default.
        dtype: of losses and probabilities, float32 (the default) or float64; logits are cast to it before the softmax.
            Not every device has float64.

    Attributes:
        partial: whether images may be missing; `compute` then leaves them out.
        skipped: rows of the images, over all ranks, that could not be decoded: these have to be missing.
        evaluated: (N,) bool on the CPU, which images are in the table over all ranks; set by `compute`.
    """

    full_state_update = False
    partial = False
    skipped: Collection[int] = ()
    evaluated: torch.Tensor | None = None

    def __init__(
        self, num_images: int, num_classes: int, num_seeds: int = 1, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        width = min(MAX_PREDICTIONS, num_classes)
        for name, shape, kind in (
            ("count", (num_seeds, num_images), torch.int32),
            ("targets", (num_images,), torch.int64),
            ("top5_classes", (num_seeds, num_images, width), torch.int64),
            ("top5_probabilities", (num_seeds, num_images, width), dtype),
            ("losses", (num_seeds, num_images), dtype),
        ):
            self.add_state(name, torch.zeros(shape, dtype=kind), dist_reduce_fx="sum")

    def update(self, seed_index: int, indices: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Fill the rows of a batch.

        Args:
            seed_index: number of the seed, in [0, K).
            indices: (B,) rows of the images.
            logits: (B, num_classes), of any float dtype.
            targets: (B,) classes; `NO_LABEL` for an image without one, whose loss is 0 and means nothing.
        """
        logits = logits.to(self.losses.dtype)
        probabilities, classes = logits.softmax(-1).topk(self.top5_classes.shape[-1])
        self.count[seed_index, indices] += 1
        self.targets[indices] = targets
        self.top5_classes[seed_index, indices] = classes
        self.top5_probabilities[seed_index, indices] = probabilities
        self.losses[seed_index, indices] = F.cross_entropy(logits, targets, ignore_index=NO_LABEL, reduction="none")

    def contents(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        """The rows of some images of this rank, images first; on the device, without synchronisation.

        Args:
            indices: (B,) rows of the images.

        Returns:
            `targets` (B,), `top5_classes` and `top5_probabilities` (B, K, P), `losses` (B, K).
        """
        tables = {name: getattr(self, name)[:, indices].movedim(1, 0) for name in _PER_SEED}
        return {"targets": self.targets[indices], **tables}

    def fill(self, indices: torch.Tensor, contents: Mapping[str, torch.Tensor]) -> None:
        """Fill rows with what `contents` returned, bit for bit, under every seed.

        Args:
            indices: (B,) rows of the images.
            contents: tensors of any device.
        """
        indices = indices.to(self.count.device)
        self.count[:, indices] += 1
        self.targets[indices] = contents["targets"].to(self.targets)
        for name in _PER_SEED:
            table = getattr(self, name)
            table[:, indices] = contents[name].to(table).movedim(0, 1)

    def top1_so_far(self) -> torch.Tensor:
        """Top-1 accuracy in percent over the rows of this rank and all seeds, a tensor on the device.

        Of images without labels it is nan.
        """
        filled = self.count > 0
        hits = filled & (self.top5_classes[..., 0] == self.targets)
        unlabelled = (filled & (self.targets == NO_LABEL)).any()
        return torch.where(unlabelled, torch.nan, 100 * hits.sum() / filled.sum().clamp(min=1))

    def compute(self) -> Records:
        """The table over all ranks, without the images skipped; with `partial`, of the images that are in it.

        Raises:
            RuntimeError: an image was not counted exactly once for each seed, or a skipped one was counted.
            UserError: there are no images.
        """
        expected = torch.ones_like(self.count[0], dtype=torch.bool)
        expected[list(self.skipped)] = False
        evaluated = (self.count > 0).all(0) if self.partial else expected
        wrong = (self.count != 1).any(0) & evaluated | (self.count != 0).any(0) & ~expected
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise RuntimeError(
                f"{int(wrong.sum())} of {wrong.numel()} images were not counted exactly once, the first of them "
                f"number {first}: {self.count[:, first].tolist()} times."
            )
        self.evaluated = evaluated.cpu()
        return Records(self.targets[evaluated], *(getattr(self, name)[:, evaluated] for name in _PER_SEED))
