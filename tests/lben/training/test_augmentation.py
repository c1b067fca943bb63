import colorsys
import math

import numpy as np
import pytest
import torch

from lben.data import pixels
from lben.training.augmentation import Augmentation, grey, random_shift, turn_hue

SLL = Augmentation(
    shift=4, reflect=True, flip=True, brightness=0.1, contrast=(0.5, 2.0), saturation=(0.3, 2.0),
    hue=0.02,
)  # fmt: skip


def images(count=60, channels=3, low=0, high=256):
    return torch.randint(low, high, (count, channels, 9, 7), dtype=torch.uint8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_without_options_nothing_changes_and_nothing_is_drawn():
    x, generator = images(), seeded()
    before = generator.get_state()
    assert torch.equal(Augmentation()(x, generator), pixels(x))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("reflect", [False, True])
def test_shifts_are_windows_of_the_padded_image(reflect):
    """And the two rows of offsets are the only draw, as they have always been."""
    x = images(40)
    moved = Augmentation(shift=3, reflect=reflect)(x, seeded())
    offsets = torch.randint(0, 7, (2, 40), generator=seeded()).tolist()
    sides = ((0, 0), (0, 0), (3, 3), (3, 3))
    padded = np.pad(x.numpy(), sides, mode="reflect" if reflect else "constant")
    for index, (row, column) in enumerate(zip(*offsets, strict=True)):
        window = padded[index, :, row : row + 9, column : column + 7]
        assert torch.equal(moved[index], pixels(torch.from_numpy(window)))
    assert moved.is_contiguous()


def test_no_shift_hands_the_images_back():
    x = images()
    assert random_shift(x, 0, seeded()) is x


def test_every_second_image_is_mirrored():
    x = images(400)
    flipped = Augmentation(flip=True)(x, seeded())
    stored = [torch.equal(a, b) for a, b in zip(flipped, pixels(x), strict=True)]
    mirrored = [torch.equal(a, b) for a, b in zip(flipped, pixels(x.flip(3)), strict=True)]
    assert all(a != b for a, b in zip(stored, mirrored, strict=True))
    assert 150 < sum(mirrored) < 250


def test_brightness_is_one_factor_per_image():
    x = images(low=30, high=200)
    factors = Augmentation(brightness=0.2)(x, seeded()) / pixels(x)
    low, high = factors.flatten(1).amin(1), factors.flatten(1).amax(1)
    torch.testing.assert_close(low, high)
    assert 0.8 <= low.min() < 0.85
    assert 1.15 < high.max() <= 1.2


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.5])
def test_contrast_stretches_about_the_mean_grey(factor):
    x = images(low=100, high=150)
    out = Augmentation(contrast=(factor, factor))(x, seeded())
    mean = grey(pixels(x)).mean((1, 2, 3)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(out, mean + factor * (pixels(x) - mean))
    single = Augmentation(contrast=(factor, factor))(x[:, :1], seeded())
    torch.testing.assert_close(single.mean((2, 3)), pixels(x[:, :1]).mean((2, 3)))


@pytest.mark.parametrize("factor", [0.0, 0.3, 2.0])
def test_saturation_stretches_about_the_grey_of_the_pixel(factor):
    x = images(low=100, high=150)
    out = Augmentation(saturation=(factor, factor))(x, seeded())
    expected = grey(pixels(x)) + factor * (pixels(x) - grey(pixels(x)))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grey(out), grey(pixels(x)), atol=1e-4, rtol=0)  # 0.9999 in all


@pytest.mark.parametrize("turn", [-0.5, -0.02, 0.0, 0.31])
def test_hue_turns_as_in_the_standard_library(turn):
    x = pixels(images(5))
    x[0, :, 0, :3] = torch.tensor([[0.0, 0.5, 1.0]])  # greys
    x[0, :, 1, :3] = torch.eye(3)  # primaries
    turned = turn_hue(x, torch.full((5, 1, 1, 1), turn))
    for before, after in zip(
        x.permute(0, 2, 3, 1).reshape(-1, 3).tolist(),
        turned.permute(0, 2, 3, 1).reshape(-1, 3).tolist(),
        strict=True,
    ):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        assert after == pytest.approx(expected, abs=2e-6)


def test_the_published_recipe_draws_per_sample_and_stays_in_range():
    x = images(1).repeat(50, 1, 1, 1)
    out = SLL(x, seeded())
    assert (out.dtype, out.shape) == (torch.float32, x.shape)
    assert 0 <= out.min() < out.max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in out}) == 50
    assert torch.equal(SLL(x, seeded()), out)
    assert not torch.equal(SLL(x, seeded(1)), out)


@pytest.mark.parametrize(
    "option",
    [
        {"shift": 1}, {"shift": 1, "reflect": True}, {"flip": True}, {"brightness": 0.1},
        {"contrast": (0.5, 2.0)}, {"saturation": (0.5, 2.0)}, {"hue": 0.1},
    ],
)  # fmt: skip
def test_every_option_acts(option):
    x = images()
    out = Augmentation(**option)(x, seeded())
    assert (out != pixels(x)).flatten(1).any(1).double().mean() > 0.3
    if "reflect" in option:
        assert not torch.equal(out, Augmentation(shift=1)(x, seeded()))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"shift": -1}, "shift must be at least 0"),
        ({"reflect": True}, "it needs a shift"),
        ({"brightness": 1.5}, r"brightness must lie in \[0, 1\], got 1.5"),
        ({"hue": 0.6}, r"hue must lie in \[0, 0.5\]"),
        ({"contrast": (2.0, 1.0)}, "contrast must be two factors 0 ≤ low ≤ high"),
        ({"saturation": (-1.0, 1.0)}, "saturation must be two factors"),
        ({"saturation": (0.0, math.inf)}, "saturation must be two factors"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**option)


@pytest.mark.parametrize(
    ("option", "channels", "message"),
    [
        ({"saturation": (0.5, 1.0)}, 1, "saturation needs images of 3 channels, got 1"),
        ({"hue": 0.1}, 1, "hue needs images of 3 channels, got 1"),
        ({"contrast": (0.5, 1.0)}, 2, "contrast needs images of 3 channels, got 2"),
        ({"shift": 7, "reflect": True}, 3, "a shift by 7 cannot reflect images of 9 × 7"),
    ],
)
def test_images_that_an_option_has_no_meaning_for_are_refused(option, channels, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**option)(images(channels=channels), seeded())
