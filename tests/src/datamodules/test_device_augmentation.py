import math

import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation

from src.datamodules import device_augmentation
from src.datamodules.device_augmentation import DeviceAugmentation, decode_images
from tests.src.datamodules.setup import dataset, message_of, write_images

SIDE = 16
# Places in an image of SIDE pixels are computed in float32 to a few units of the last of its 24 bits, and from one
# pixel to the next a value changes by 255 at most.
PLACES = 4 * 2**-24 * SIDE * 255

NOTHING = {"scale": (1, 1), "ratio": (1, 1), "hflip": 0, "vflip": 0, "rotation": 0, "color_jitter": 0}
CROP = {"scale": (0.2, 0.9), "ratio": (0.75, 1.5)}


def augmentation(image_size=SIDE, **options):
    return DeviceAugmentation(image_size, **{**NOTHING, **options})


def augment(images, aspects=None, **options):
    transform = augmentation(images.shape[-1], **options)
    return transform(images, *transform.sample(torch.ones(len(images)) if aspects is None else aspects))


@pytest.fixture
def images():
    return torch.randint(256, (5, 3, SIDE, SIDE), dtype=torch.uint8)


def assert_within(result, expected, tolerance):
    assert result.shape == expected.shape
    assert result.dtype == torch.float32
    assert (result - expected).abs().max() <= tolerance


# ---- flips and rotations ----------------------------------------------------------------------------------


def test_nothing_asked_for_changes_nothing(images):
    assert_within(augment(images), images, PLACES)


def test_flips_are_torchs(images):
    assert_within(augment(images, hflip=1), images.flip(3), PLACES)
    assert_within(augment(images, vflip=1), images.flip(2), PLACES)
    assert_within(augment(images, hflip=1, vflip=1), images.flip(2, 3), PLACES)


@pytest.mark.parametrize(("option", "dim"), [("hflip", 3), ("vflip", 2)])
def test_flips_have_their_probability(option, dim):
    number = 2000
    images = torch.arange(SIDE, dtype=torch.float32).expand(number, 3, SIDE, SIDE)
    images = images if dim == 3 else images.mT
    result = augment(images, **{option: 0.3})
    share = (result - images).abs().amax((1, 2, 3)).gt(1).float().mean().item()
    assert abs(share - 0.3) <= 4 * math.sqrt(0.3 * 0.7 / number)  # four standard errors


def largest_draws(monkeypatch):
    """Every range gives its upper end."""
    monkeypatch.setattr(device_augmentation, "_uniform", lambda shape, low, high: torch.full(shape, float(high)))


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (180, 2)])
def test_an_angle_turns_against_the_clock_like_rot90(images, monkeypatch, rotation, turns):
    largest_draws(monkeypatch)
    assert_within(augment(images, rotation=rotation), images.rot90(turns, (2, 3)), PLACES)


def test_a_turned_image_is_flipped(images, monkeypatch):
    largest_draws(monkeypatch)
    assert_within(augment(images, rotation=90, hflip=1), images.rot90(1, (2, 3)).flip(3), PLACES)


def test_angles_are_as_large_as_asked_to_either_side():
    matrix = augmentation(rotation=30).sample_maps(torch.ones(2000))
    angles = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]).rad2deg()
    # of 2000 samples over 60 degrees, the outermost are within a degree of the ends but for one case in 10^14
    assert -30 - 1e-3 <= angles.min() < -29
    assert 29 < angles.max() <= 30 + 1e-3


@pytest.mark.parametrize("aspect", [0.5, 2.0])
def test_a_rotation_keeps_right_angles_in_the_image_as_it_was(aspect):
    maps = augmentation(rotation=70, **CROP).sample_maps(torch.full((50,), aspect))
    pixels = maps * torch.tensor([aspect, 1.0])[None, :, None]  # of an image `aspect` wide and 1 high
    across, down = pixels[:, :, 0], pixels[:, :, 1]
    assert (across[:, 1].abs() > 0.1 * across[:, 0].abs()).any()
    # a cosine, of float32 numbers
    assert ((across * down).sum(1) / across.norm(dim=1) / down.norm(dim=1)).abs().max() < 1e-6


def test_what_a_rotation_brings_in_is_reflected(monkeypatch):
    largest_draws(monkeypatch)
    images = torch.full((1, 3, SIDE, SIDE), 200.0)
    # padding with zeros would darken the corners
    assert_within(augment(images, rotation=45), images, PLACES)


# ---- crops ------------------------------------------------------------------------------------------------


def crops(aspect, number, image_size=8, side=64, **options):
    """Left, top, right and bottom (each (number,), in parts of the image) of crops, read off augmented gradients."""
    places = (torch.arange(side) + 0.5) / side
    image = torch.stack([places.expand(side, side), places.expand(side, side).mT, torch.zeros(side, side)])
    transform = augmentation(image_size, **{**CROP, **options})
    result = transform(image.expand(number, 3, side, side), *transform.sample(torch.full((number,), aspect)))
    # from pixels a quarter inside, since in the outermost half pixel of the image the gradient is reflected
    first = image_size // 4
    middle, last = image_size // 2, image_size - 1 - first
    x0, x1 = result[:, 0, middle, first], result[:, 0, middle, last]
    y0, y1 = result[:, 1, first, middle], result[:, 1, last, middle]

    def ends(near, far):
        pixel = (far - near) / (last - first)
        return near - (first + 0.5) * pixel, far + (first + 0.5) * pixel

    (left, right), (top, bottom) = ends(x0, x1), ends(y0, y1)
    return left, top, right, bottom


ROUNDING = 1e-5  # some tens of float32's units of the last place at 1: places are read off by extrapolation


@pytest.mark.parametrize("aspect", [0.5, 1.0, 2.0])
def test_crops_are_in_the_image_and_have_the_area_and_shape_asked_for(aspect):
    left, top, right, bottom = crops(aspect, 1000)
    assert min(left.min(), top.min()) >= -ROUNDING
    assert max(right.max(), bottom.max()) <= 1 + ROUNDING
    area = (right - left) * (bottom - top)
    assert CROP["scale"][0] - ROUNDING <= area.min()
    assert area.max() <= CROP["scale"][1] + ROUNDING
    shape = (right - left) / (bottom - top) * aspect
    assert CROP["ratio"][0] - 10 * ROUNDING <= shape.min() < 0.8  # over sides of a third and more
    assert 1.4 < shape.max() <= CROP["ratio"][1] + 10 * ROUNDING
    if aspect == 1:
        # 1000 samples from a range of 0.7 come within 0.02 of its lower end except once in 10^12; the largest areas
        # fit for few shapes alone
        assert area.min() < 0.22
        assert area.max() > 0.85
    assert left.unique().numel() > 900


def their_crops(aspect, number, scale, ratio):
    """The same from torchvision, on an image large enough that whole pixels do not show."""
    height, width = (2000, round(2000 * aspect))
    image = torch.empty(3, height, width, device="meta")
    i, j, h, w = torch.tensor(
        [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(number)]
    ).T.double()
    return j / width, i / height, (j + w) / width, (i + h) / height


@pytest.mark.parametrize("aspect", [0.5, 1.0, 2.0])
def test_crops_are_distributed_as_torchvisions(aspect):
    number = 4000

    def figures(left, top, right, bottom):
        width, height = right - left, bottom - top
        return {
            "area": width * height,
            "shape": (width / height).log(),
            "left": left,
            "top": top,
            "distance from the middle, across": (left + right - 1).abs(),
            "distance from the middle, down": (top + bottom - 1).abs(),
        }

    options = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}
    ours, theirs = figures(*crops(aspect, number, **options)), figures(*their_crops(aspect, number, **options))
    for name, values in ours.items():
        for power in (1, 2):
            a, b = values.double() ** power, theirs[name] ** power
            # four standard errors of the difference, 1 in 16,000, and one part in a thousand for whole pixels
            tolerance = 4 * math.sqrt((a.var() + b.var()) / number) + 1e-3 * b.abs().mean()
            assert abs(a.mean() - b.mean()) <= tolerance, f"{name}, power {power}: {a.mean()}, {b.mean()}"


@pytest.mark.parametrize(
    ("aspect", "scale", "ratio"),
    [(4.0, (0.9, 1.0), (0.75, 1.5)), (0.2, (0.9, 1.0), (0.75, 1.5)), (1.5, (1.0, 1.0), (0.75, 1.6))],
)
def test_where_no_crop_fits_it_is_the_largest_in_the_middle_as_torchvisions(aspect, scale, ratio):
    ours, theirs = crops(aspect, 20, scale=scale, ratio=ratio), their_crops(aspect, 1, scale, ratio)
    for place, expected in zip(ours, theirs, strict=True):
        assert (place - expected).abs().max() <= 1 / 400 + ROUNDING  # one pixel of torchvision's narrowest image


# ---- colours ----------------------------------------------------------------------------------------------


def test_colours_change_as_by_torchvision_in_this_order(images):
    factors = torch.tensor([[1.4, 1.0, 1.0], [1.0, 0.6, 1.0], [1.0, 1.0, 1.4], [1.4, 1.4, 0.6], [0.6, 1.4, 1.4]])
    results = augmentation(color_jitter=0.4)(images, augmentation().sample_maps(torch.ones(5)), factors)
    for image, result, (brightness, contrast, saturation) in zip(images, results, factors.tolist(), strict=True):
        expected = adjust_brightness(image / 255, brightness)
        expected = adjust_saturation(adjust_contrast(expected, contrast), saturation)
        # torchvision's weight of red is 0.2989, for 0.299: greys differ by 1e-4 at most, and contrast and saturation
        # move by a part of that away from them, after which saturation stretches
        greys = 1e-4 * (abs(1 - contrast) * (saturation + abs(1 - saturation)) + abs(1 - saturation))
        assert_within(result / 255, expected, greys + 2 * PLACES / 255)


def test_factors_are_uniform_in_the_range():
    _, factors = augmentation(color_jitter=0.3).sample(torch.ones(3000))
    assert factors.shape == (3000, 3)
    for column in factors.T:  # of 3000 samples, one is within 0.01 of each end but for one case in 10^21
        assert 0.7 - 1e-6 <= column.min() < 0.71
        assert 1.29 < column.max() <= 1.3 + 1e-6
    _, factors = augmentation(color_jitter=2.0).sample(torch.ones(3000))
    assert (factors >= 0).all()
    assert (factors == 0).float().mean() < 0.01  # a negative factor is not drawn, rather than cut off


def test_results_are_in_range(images):
    result = augmentation(color_jitter=0.9)(images, augmentation().sample_maps(torch.ones(5)), torch.full((5, 3), 1.9))
    assert (result.min(), result.max()) == (0, 255)


# ---- samples ------------------------------------------------------------------------------------------------

EVERYTHING = {**CROP, "hflip": 0.5, "vflip": 0.5, "rotation": 20, "color_jitter": 0.4}


def test_each_image_has_parameters_of_its_own():
    maps, jitter = augmentation(**EVERYTHING).sample(torch.ones(50))
    for numbers in (maps[:, 0, 0], maps[:, 0, 1], maps[:, 0, 2], maps[:, 1, 2], *jitter.T):
        assert numbers.unique().numel() == 50
    assert jitter.unique().numel() == 150
    signs = maps[:, [0, 1], [0, 1]].sign()
    assert signs.unique(dim=0).shape == (4, 2)


def test_samples_depend_on_the_seed_of_the_cpu():
    transform = augmentation(**EVERYTHING)

    def draw(seed):
        torch.default_generator.manual_seed(seed)
        return transform.sample(torch.ones(4))

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_augmenting_uses_no_generator(images):
    transform = augmentation(**EVERYTHING)
    parameters = transform.sample(torch.ones(5))
    state = torch.get_rng_state()
    assert torch.equal(transform(images, *parameters), transform(images, *parameters))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_side_may_change(images):
    transform = augmentation(image_size=SIDE // 2)
    result = transform(images, *transform.sample(torch.ones(5)))
    expected = torch.nn.functional.avg_pool2d(images.float(), 2)  # bilinear, half way between two pixels each
    assert_within(result, expected, PLACES)


# ---- decoding ---------------------------------------------------------------------------------------------


RED, GREEN, BLUE, WHITE = (200, 0, 0), (0, 150, 0), (0, 0, 100), (255, 255, 255)


def write_quarters(path, width, height, colours):
    """Four colours: above left and right, below left and right."""
    image = Image.new("RGB", (width, height))
    for number, colour in enumerate(colours):
        image.paste(colour, (number % 2 * width // 2, number // 2 * height // 2, width, height))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_images_are_decoded_into_squares(tmp_path):
    all_colours = [(RED, GREEN, BLUE, WHITE), (BLUE, RED, GREEN, GREEN), (WHITE, WHITE, RED, BLUE)]
    for name, size, colours in zip(("a/0", "a/1", "b/0"), ((40, 20), (16, 64), (32, 32)), all_colours, strict=True):
        write_quarters(tmp_path / f"{name}.png", *size, colours)
    images, aspects = decode_images(dataset(tmp_path, 2), 8)
    assert (images.shape, images.dtype) == ((3, 3, 8, 8), torch.uint8)
    assert aspects.tolist() == [2.0, 0.25, 1.0]
    for image, colours in zip(images, all_colours, strict=True):
        # apart from the two pixels to either side of a seam that a bicubic filter mixes
        quarters = (image[:, :2, :2], image[:, :2, 6:], image[:, 6:, :2], image[:, 6:, 6:])
        for quarter, colour in zip(quarters, colours, strict=True):
            assert (quarter == torch.tensor(colour)[:, None, None]).all()


def test_the_transform_is_not_applied(tmp_path):
    write_images(tmp_path, "a/0.png")
    images, aspects = decode_images(dataset(tmp_path, 1, transform=None), 4)
    assert images.float().std() > 0
    assert aspects.tolist() == [20 / 16]


def test_the_first_damaged_file_is_reported(tmp_path):
    write_images(tmp_path, *[f"a/{i}.jpg" for i in range(9)])
    for i in (4, 7):
        (tmp_path / f"a/{i}.jpg").write_bytes(b"broken")
    message = message_of(decode_images, dataset(tmp_path, 1), 8)
    path = tmp_path / "a/4.jpg"
    assert message == f"Cannot decode the image {path}: not an image of a known format. Remove or replace the file."
