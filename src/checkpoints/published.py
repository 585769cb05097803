"""The files of the T2T-ViT release."""

from __future__ import annotations

from dataclasses import dataclass

PUBLISHED_URL = "https://github.com/yitu-opensource/T2T-ViT/releases/download/main/"


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A file of the T2T-ViT release.

    Attributes:
        file_name: name under `PUBLISHED_URL`; starts with the top-1 accuracy in percent (the CIFAR files end with it).
        variant: one of `T2T_VIT_VARIANTS`.
        image_size: height and width of the images it was trained on, in pixels.
        num_classes: number of classes.
    """

    file_name: str
    variant: str
    image_size: int = 224
    num_classes: int = 1000


# The token-labelling file of the 24-block model (84.2) is missing: other code trained it, with a second head.
PUBLISHED_CHECKPOINTS: dict[str, PublishedCheckpoint] = {
    "t2t_vit_7": PublishedCheckpoint("71.7_T2T_ViT_7.pth.tar", "t2t_vit_7"),
    "t2t_vit_10": PublishedCheckpoint("75.2_T2T_ViT_10.pth.tar", "t2t_vit_10"),
    "t2t_vit_12": PublishedCheckpoint("76.5_T2T_ViT_12.pth.tar", "t2t_vit_12"),
    "t2t_vit_14": PublishedCheckpoint("81.5_T2T_ViT_14.pth.tar", "t2t_vit_14"),
    "t2t_vit_19": PublishedCheckpoint("81.9_T2T_ViT_19.pth.tar", "t2t_vit_19"),
    "t2t_vit_24": PublishedCheckpoint("82.3_T2T_ViT_24.pth.tar", "t2t_vit_24"),
    "t2t_vit_t_14": PublishedCheckpoint("81.7_T2T_ViTt_14.pth.tar", "t2t_vit_t_14"),
    "t2t_vit_t_19": PublishedCheckpoint("82.4_T2T_ViTt_19.pth.tar", "t2t_vit_t_19"),
    "t2t_vit_t_24": PublishedCheckpoint("82.6_T2T_ViTt_24.pth.tar", "t2t_vit_t_24"),
    "t2t_vit_14_384": PublishedCheckpoint("83.3_T2T_ViT_14.pth.tar", "t2t_vit_14", image_size=384),
    "t2t_vit_14_cifar10": PublishedCheckpoint("cifar10_t2t-vit_14_98.3.pth", "t2t_vit_14", num_classes=10),
    "t2t_vit_19_cifar10": PublishedCheckpoint("cifar10_t2t-vit_19_98.4.pth", "t2t_vit_19", num_classes=10),
    # The typo "cirfar" is in the published name.
    "t2t_vit_14_cifar100": PublishedCheckpoint("cirfar100_t2t-vit-14_88.4.pth", "t2t_vit_14", num_classes=100),
    "t2t_vit_19_cifar100": PublishedCheckpoint("cifar100_t2t-vit-19_89.0.pth", "t2t_vit_19", num_classes=100),
}
