"""Published accuracies on the ImageNet-1k validation set, to compare results with."""

from __future__ import annotations

from dataclasses import dataclass

NUM_CLASSES = 1000
NUM_IMAGES = 50_000
IMAGE_SIZE = 224

T2T_VIT_SOURCE = "T2T-ViT (Yuan et al., ICCV 2021)"
SCATTERBRAIN_SOURCE = "Scatterbrain (Chen, Dao et al., NeurIPS 2021), reference implementation"


@dataclass(frozen=True)
class PublishedAccuracy:
    """A published top-1 accuracy, or the range of one that varies with the seed.

    Args:
        low: smallest published top-1, percent.
        high: largest published top-1, percent; equal to `low` where one accuracy was published.
        source: who published it.
        remeasured_top1: top-1 of the published checkpoint measured again, percent, to three places; None if
            it was not.
        remeasured_top5: top-5 of the same measurement, percent; None if there is none.
    """

    low: float
    high: float
    source: str
    remeasured_top1: float | None = None
    remeasured_top5: float | None = None

    @property
    def text(self) -> str:
        """The accuracy as it was published: `"81.7"`, or `"77.8-79.0"` for a range."""
        return f"{self.low:.1f}" if self.low == self.high else f"{self.low:.1f}-{self.high:.1f}"

    def difference(self, top1: float) -> float:
        """How far a measured accuracy lies from the published one.

        Args:
            top1: measured top-1, percent.

        Returns:
            Points, negative where `top1` is lower; to the nearer end of a range, 0 inside it.
        """
        return top1 - min(max(top1, self.low), self.high)


def _published(
    low: float, high: float, top1: float | None = None, top5: float | None = None, source: str = T2T_VIT_SOURCE
) -> PublishedAccuracy:
    return PublishedAccuracy(low, high, source, top1, top5)


# Models with their own token stages: Performer in `t2t_vit_*`, full attention in `t2t_vit_t_*`.
_VARIANTS = {
    "t2t_vit_7": _published(71.7, 71.7, 71.676, 90.886),
    "t2t_vit_10": _published(75.2, 75.2, 75.150, 92.806),
    "t2t_vit_12": _published(76.5, 76.5, 76.480, 93.484),
    "t2t_vit_14": _published(81.5, 81.5, 81.500, 95.666),
    "t2t_vit_19": _published(81.9, 81.9, 81.932, 95.744),
    "t2t_vit_24": _published(82.3, 82.3, 82.276, 95.886),
    "t2t_vit_t_14": _published(81.7, 81.7, 81.688, 95.852),
    "t2t_vit_t_19": _published(82.4, 82.4, 82.442, 96.082),
    "t2t_vit_t_24": _published(82.6, 82.6, 82.554, 96.064),
    "t2t_vit_14_resnext": _published(81.5, 81.5),
    "t2t_vit_14_wide": _published(79.8, 79.8),
}

# Models whose full attention was replaced after training.
_SWAPPED = {
    ("t2t_vit_t_14", "local"): _published(80.6, 80.6, source=SCATTERBRAIN_SOURCE),
    ("t2t_vit_t_14", "performer"): _published(77.8, 79.0, source=SCATTERBRAIN_SOURCE),
    ("t2t_vit_t_14", "sblocal"): _published(81.1, 81.1, source=SCATTERBRAIN_SOURCE),
}


def published_top1(
    model: str, attention: str | None, num_classes: int, image_size: int, num_images: int | None = None
) -> PublishedAccuracy | None:
    """The published top-1 accuracy of a model with a given attention in its token stages.

    They hold for the whole ImageNet-1k validation set at 224 px; for anything else there is none.

    Args:
        model: name of the variant, such as `"t2t_vit_t_14"`.
        attention: name of the attention config; None for a model that keeps its own token stages.
        num_classes: number of outputs of the model.
        image_size: side of the input, pixels.
        num_images: number of images evaluated; None (the default) leaves it unchecked.

    Returns:
        The accuracy, or None where none was published.
    """
    if num_classes != NUM_CLASSES or image_size != IMAGE_SIZE or num_images not in (None, NUM_IMAGES):
        return None
    if attention is None or (attention == "full" and model.startswith("t2t_vit_t_")):
        return _VARIANTS.get(model)
    return _SWAPPED.get((model, attention))
