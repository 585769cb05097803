import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from src.datamodules.augmentation import Augmentation, seed_augmentation
from tests.src.datamodules.setup import PHOTOGRAPHS, message_of

SIDE = 16
MEAN, STD = (0.5, 0.4, 0.3), (0.1, 0.2, 0.25)
NUM_CLASSES = 4
# Of whole batches, and of single images.
FINISH_OFF = {"re_prob": 0, "mixup_prob": 0, "label_smoothing": 0}
START_OFF = {"scale": (1, 1), "hflip": 0, "color_jitter": 0, "auto_augment": None}


def augmentation(**options):
    return Augmentation(SIDE, NUM_CLASSES, **{"mean": MEAN, "std": STD, **options})


@pytest.fixture
def images():
    return torch.randint(256, (6, 3, SIDE, SIDE), dtype=torch.uint8)


@pytest.fixture
def targets():
    return torch.tensor([0, 1, 2, 3, 1, 0])


@pytest.fixture(scope="module")
def photograph():
    with Image.open(PHOTOGRAPHS[0]) as image:
        return image.convert("RGB").resize((60, 45))


def augment(transform, image, seed):
    seed_augmentation(seed)
    return torch.as_tensor(transform(image))  # an array, of some versions of timm


def one_hot(targets):
    return torch.eye(NUM_CLASSES)[targets]


# ---- whole batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_finishing_normalises(images, targets, dtype):
    given = images.to(dtype)
    finished, probabilities = augmentation(**FINISH_OFF).finish(given, targets)
    for colour in range(3):
        expected = (images[:, colour].double() / 255 - MEAN[colour]) / STD[colour]
        # float32, of numbers up to 255 before and 10 after
        assert (finished[:, colour] - expected).abs().max() <= 4 * 2**-24 * 10
    assert finished.dtype == probabilities.dtype == torch.float32
    assert torch.equal(probabilities, one_hot(targets))
    assert torch.equal(given, images.to(dtype))


def test_labels_are_smoothed_over_all_classes(images, targets):
    _, probabilities = augmentation(**FINISH_OFF | {"label_smoothing": 0.2}).finish(images, targets)
    # 0.2 / 4 for each class, and the other 0.8 for the right one
    torch.testing.assert_close(probabilities, 0.05 + 0.8 * one_hot(targets), rtol=0, atol=2**-23)


@pytest.mark.parametrize(
    "mixing",
    [
        {"mixup_alpha": 0.8, "cutmix_alpha": 0},
        {"mixup_alpha": 0, "cutmix_alpha": 1.0},
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    ],
)
@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_targets_are_mixed_as_images_are(mixing, smoothing):
    # image i is nothing but i, of class i: the mean over the pixels gives the parts
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, SIDE, SIDE) * 255
    options = {"re_prob": 0, "label_smoothing": smoothing, "mean": (0, 0, 0), "std": (1, 1, 1)}
    transform = augmentation(**options, **mixing)
    parts = []
    for seed in range(30):
        seed_augmentation(seed)
        mixed, probabilities = transform.finish(images, torch.arange(4))
        # the last digits of sums of float32 numbers
        torch.testing.assert_close(probabilities.sum(1), torch.ones(4), rtol=0, atol=1e-6)
        right = (probabilities - smoothing / 4) / (1 - smoothing)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), right @ torch.arange(4.0), rtol=0, atol=1e-5)
        assert ((right > 1e-6).sum(1) <= 2).all()  # pairs, of first and last and so on
        torch.testing.assert_close(right, right.flip(0, 1), rtol=0, atol=1e-6)
        parts.append(right[0, 0].item())
        if not mixing["mixup_alpha"]:
            assert ((mixed - mixed.round()).abs() < 1e-5).all()  # whole pixels of either
        if not mixing["cutmix_alpha"]:
            assert torch.equal(mixed, mixed[:, :1, :1, :1].expand_as(mixed))
    assert len(set(parts)) > 20
    assert any(0.2 < part < 0.8 for part in parts)


def share(happened):
    """Mean of yes and no, with four of its standard errors at a half, the largest ones."""
    return np.mean(happened), 4 * 0.5 / math.sqrt(len(happened))


def test_mixing_has_its_probabilities(images, targets):
    transform = augmentation(mixup_prob=0.6, mixup_switch_prob=0.25, re_prob=0, label_smoothing=0)
    plain, _ = augmentation(**FINISH_OFF).finish(images, targets)
    mixed, cut = [], []
    for seed in range(400):
        seed_augmentation(seed)
        finished, probabilities = transform.finish(images, targets)
        mixed.append(not torch.equal(probabilities, one_hot(targets)))
        if mixed[-1]:
            cut.append(torch.isin(finished[0], plain[[0, 5]]).all().item())
    (part, tolerance), (part_cut, tolerance_cut) = share(mixed), share(cut)
    # one rectangle of CutMix in 256 is empty, far less than the tolerance
    assert abs(part - 0.6) <= tolerance
    assert abs(part_cut - 0.25) <= tolerance_cut


@pytest.mark.parametrize(
    ("options", "mixes"),
    [
        ({}, True),
        ({"mixup_prob": 0}, False),
        ({"mixup_alpha": 0}, True),
        ({"cutmix_alpha": 0}, True),
        ({"mixup_alpha": 0, "cutmix_alpha": 0}, False),
    ],
)
def test_whether_it_mixes(options, mixes):
    assert augmentation(**options).mixes is mixes


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erasing(targets, mode):
    number = 600
    images = torch.full((number, 3, SIDE, SIDE), 255, dtype=torch.uint8)
    transform = augmentation(**FINISH_OFF | {"re_prob": 0.4, "re_mode": mode})
    seed_augmentation(0)
    finished, probabilities = transform.finish(images, torch.zeros(number, dtype=torch.long))
    assert (images == 255).all()
    assert torch.equal(probabilities, one_hot(torch.zeros(number, dtype=torch.long)))
    plain = augmentation(**FINISH_OFF).finish(images[:1], targets[:1])[0]
    changed = (finished != plain).any(1)
    erased = changed.any((1, 2))
    part, tolerance = share(erased.numpy())
    assert abs(part - 0.4) <= tolerance
    areas = changed[erased].float().mean((1, 2))
    # timm's rectangles: between 0.02 and 1/3 of the image, half way between on average
    spread = (1 / 3 - 0.02) / math.sqrt(12)
    assert abs(areas.mean() - (1 / 3 + 0.02) / 2) <= 4 * spread / math.sqrt(len(areas))
    colours = finished[erased][0][:, changed[erased][0]]
    assert colours.unique(dim=1).shape[1] == (colours.shape[1] if mode == "pixel" else 1)
    assert (colours == 0).all().item() is (mode == "const")


def test_nothing_is_random_where_nothing_is_asked_for(images, targets, photograph):
    transform = augmentation(**START_OFF, **FINISH_OFF, ratio=(4 / 3, 4 / 3))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first, second = (transform.finish(images, targets) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    resized = pil_to_tensor(photograph.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    for seed in range(5):
        assert torch.equal(augment(transform.transform, photograph, seed), resized)


def test_finishing_follows_from_the_seed(images, targets):
    transform = augmentation()

    def finish(seed):
        seed_augmentation(seed)
        return transform.finish(images, targets)

    first, again, other = finish(2**62 - 1), finish(2**62 - 1), finish(5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_seeding_seeds_every_generator_of_the_cpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", pytest.fail)

    def draw(seed):
        seed_augmentation(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    first, again, other = draw(2**62 + 3), draw(2**62 + 3), draw(4)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


# ---- single images ----------------------------------------------------------------------------------------


def test_single_images_follow_from_the_seed(photograph):
    transform = augmentation().transform
    results = [augment(transform, photograph, seed) for seed in range(20)]
    assert {(image.shape, image.dtype) for image in results} == {((3, SIDE, SIDE), torch.uint8)}
    assert torch.stack(results).unique(dim=0).shape[0] == 20
    assert all(torch.equal(image, augment(transform, photograph, seed)) for seed, image in enumerate(results))


@pytest.mark.parametrize("option", ["hflip", "vflip"])
def test_flips_have_their_probability(photograph, option):
    transform = augmentation(**START_OFF | {option: 0.3}, ratio=(4 / 3, 4 / 3)).transform
    results = [augment(transform, photograph, seed) for seed in range(400)]
    plain = augment(augmentation(**START_OFF, ratio=(4 / 3, 4 / 3)).transform, photograph, 0)
    flipped = plain.flip(2 if option == "hflip" else 1)
    assert all(torch.equal(image, plain) or torch.equal(image, flipped) for image in results)
    part, tolerance = share([torch.equal(image, flipped) for image in results])
    assert abs(part - 0.3) <= tolerance


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m10-n4-tweights", "original", "v0", "3a", "augmix-m3-w3", "augmix-m9-b1"]
)
def test_policies_run(photograph, policy):
    transform = augmentation(auto_augment=policy).transform
    plain = augmentation(auto_augment=None, color_jitter=0).transform
    different = [
        not torch.equal(augment(transform, photograph, seed), augment(plain, photograph, seed)) for seed in range(300)
    ]
    # two operations with a probability of one half each change three images in four, and some of them change nothing
    assert sum(different) > 150


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "random"])
def test_interpolations_that_turn_images(photograph, interpolation):
    transform = augmentation(interpolation=interpolation).transform
    # two of 15 operations, of which five turn, shear or move, at a probability of one half: a third of the images
    assert all(augment(transform, photograph, seed).shape == (3, SIDE, SIDE) for seed in range(40))


@pytest.mark.parametrize("interpolation", ["box", "hamming", "lanczos"])
def test_interpolations_that_cannot_rotate(photograph, interpolation):
    message = message_of(augmentation, interpolation=interpolation)
    assert message.startswith(f"datamodule.augmentation.interpolation={interpolation} cannot rotate images")
    assert "datamodule.augmentation.auto_augment" in message
    assert augmentation(interpolation=interpolation, auto_augment=None).transform(photograph).shape == (3, SIDE, SIDE)


@pytest.mark.parametrize(
    "policy", ["rand-m10-mstd0-inc1-p1.0", "augmix-m10-mstd0-w1-d1", "original-mstd0"], ids=["rand", "augmix", "auto"]
)
def test_posterizing_takes_every_number_of_bits(photograph, policy):
    (step,) = (
        step
        for step in augmentation(auto_augment=policy).transform.transforms
        if hasattr(step, "ops") or hasattr(step, "policy")
    )
    operations = step.ops if hasattr(step, "ops") else [operation for steps in step.policy for operation in steps]
    posterize = [operation for operation in operations if operation.name.startswith("Posterize")]
    assert posterize
    pixels = pil_to_tensor(photograph).int()
    for operation in posterize:
        for bits in range(9):
            result = pil_to_tensor(operation.aug_fn(photograph, bits, **operation.kwargs))
            assert torch.equal(result.int(), pixels // 2 ** (8 - bits) * 2 ** (8 - bits))


def test_a_policy_that_asks_for_no_bits_gives_black(photograph):
    transform = augmentation(auto_augment="rand-m10-mstd0-inc1-p1.0-n1", scale=(1, 1)).transform
    assert any(not augment(transform, photograph, seed).any() for seed in range(100))


# ---- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("hflip", 1.1, "from 0 to 1"),
        ("vflip", -0.1, "from 0 to 1"),
        ("re_prob", "0.5", "from 0 to 1"),
        ("mixup_prob", True, "from 0 to 1"),
        ("mixup_switch_prob", None, "from 0 to 1"),
        ("label_smoothing", float("nan"), "from 0 to 1"),
        ("color_jitter", -1, "at least 0"),
        ("color_jitter", float("inf"), "at least 0"),
        ("mixup_alpha", -0.8, "at least 0"),
        ("mixup_alpha", float("nan"), "at least 0"),
        ("cutmix_alpha", [1.0], "at least 0"),
        ("rotation", 181, "from 0 to 180"),
        ("scale", (0.08, 1.1), "at most 1"),
        ("scale", (0, 1), "above 0"),
        ("scale", (0.9, 0.1), "the smaller first"),
        ("scale", 0.5, "two numbers"),
        ("scale", (0.1, 0.5, 1.0), "two numbers"),
        ("scale", (float("nan"), 1), "two numbers"),
        ("ratio", (0, 1), "above 0"),
        ("ratio", (1, float("inf")), "two numbers"),
        ("ratio", "wide", "two numbers"),
        ("re_mode", "noise", "const, pixel, rand"),
        ("interpolation", "bicubik", "Did you mean 'bicubic'"),
        ("interpolation", 3, "random"),
        ("auto_augment", "augmentmix", "rand-m9-mstd0.5-inc1"),
        ("auto_augment", "rand-m9-foo1", "Unknown RandAugment config section"),
        ("auto_augment", "rand-mstd0.5.5", "0.5.5"),
        ("auto_augment", 9, "or null"),
        ("auto_augment", True, "or null"),
    ],
)
def test_values_that_are_not_valid_name_the_option(option, value, remedy):
    message = message_of(augmentation, **{option: value})
    assert message.startswith(f"datamodule.augmentation.{option}=")
    assert "is not valid" in message
    assert remedy in message


@pytest.mark.parametrize(
    "options", [{"scale": ["0.5", "1"]}, {"ratio": [1, 1]}, {"mixup_prob": 1}, {"color_jitter": 3}, {"re_prob": 1}]
)
def test_values_at_the_limits_are_valid(options, photograph, images, targets):
    transform = augmentation(auto_augment=None, **options)
    assert transform.transform(photograph).shape == (3, SIDE, SIDE)
    assert transform.finish(images, targets)[0].isfinite().all()


def test_what_works_in_workers_alone_or_on_the_device_alone():
    message = message_of(augmentation, on_device=True)
    assert message.startswith("datamodule.augmentation.auto_augment=rand-m9-mstd0.5-inc1 ")
    assert "datamodule.on_device=false" in message
    message = message_of(augmentation, rotation=10)
    assert message.startswith("datamodule.augmentation.rotation=10 ")
    assert "datamodule.on_device=true" in message


def test_on_the_device_there_is_another_start():
    transform = augmentation(
        on_device=True, auto_augment=None, rotation=30, scale=["0.5", 0.9], ratio=(1, 2), hflip=0.1, vflip=0.2
    )
    assert transform.transform is None
    start = transform.batch_transform
    assert (start.image_size, start.scale, start.ratio) == (SIDE, (0.5, 0.9), (1, 2))
    assert (start.hflip, start.vflip, start.color_jitter) == (0.1, 0.2, 0.4)
    assert start.rotation == pytest.approx(math.pi / 6)
    assert augmentation().batch_transform is None
