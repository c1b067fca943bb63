"""Explicit classifiers: built as published, certified per pair, never broken inside a radius."""

import pytest
import torch

from lben import FeedforwardClassifierConfig
from lben.evaluation.attacks import pgd_l2
from lben.layers import AveragePooling, SLLConv2d, SLLLinear
from lben.models import ImageTask, published_architecture
from lben.training import checkpoints

SMALL = {
    "shape": (3, 8, 8), "classes": 4, "mean": (0.5, 0.5, 0.5), "std": (1.0, 1.0, 1.0),
    "channels": (6,), "depths": (2,), "conv_hidden": 3, "pool": 4, "dense_depth": 1,
    "dense_hidden": 8,
}  # fmt: skip


def config(**changes):
    return FeedforwardClassifierConfig(**{**SMALL, **changes})


@pytest.mark.parametrize("block", ["sll", "cpl", "aol", "spectral", "sandwich"])
def test_every_family_is_certified_and_holds(block):
    model = config(block=block, channels=(6, 8), depths=(1, 2), pool=2).build().to_exact(1e-8)
    certificate = model.certificate()
    assert 0.3 < certificate.bound < 1.01 * model.gamma
    x = torch.rand(30, 3, 8, 8, dtype=torch.float64)
    logits = model.forward_with_error(x, certificate)
    torch.testing.assert_close(logits.value, model(x))
    assert float(logits.error.max()) < 1e-8
    labels = logits.value.argmax(1)
    radius = model.certified_radius(x, labels, certificate)
    assert (radius > 0).all()
    for i in range(4):
        _, broken = pgd_l2(model, x[i : i + 1], labels[i : i + 1], 0.999 * float(radius[i]))
        assert not broken.any()


def test_a_radius_is_approached():
    model = config(channels=(3,), depths=(0,), pool=1, dense_depth=0).build().to_exact(1e-8)
    x = 0.4 + 0.2 * torch.rand(20, 3, 8, 8, dtype=torch.float64)
    labels = model(x).argmax(1)
    radius = model.certified_radius(x, labels)
    broken = [
        bool(pgd_l2(model, x[i : i + 1], labels[i : i + 1], 1.01 * float(radius[i]))[1])
        for i in range(20)
    ]
    assert sum(broken) > 15  # a linear network: the pair bound is exact


IMAGES_32 = ImageTask(shape=(3, 32, 32), classes=10, mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.mark.parametrize(
    ("size", "convolutions", "dense", "channels"),
    [("small", 20, 7, 45), ("medium", 30, 10, 60), ("large", 50, 10, 90), ("xlarge", 70, 15, 120)],
)
def test_published_networks(size, convolutions, dense, channels):
    made = published_architecture(size).for_data(IMAGES_32)
    assert (made.depths, made.dense_depth, made.channels) == ((convolutions,), dense, (channels,))
    assert (made.conv_hidden, made.dense_hidden, made.pool) == (5, 2048, 4)


def test_sll_small_has_the_published_layers():
    model = published_architecture("small").for_data(IMAGES_32).build()
    kinds = [type(layer) for layer in model.features]
    assert kinds.count(SLLConv2d) == 20
    assert kinds.count(SLLLinear) == 7
    assert kinds.count(AveragePooling) == 1
    assert model.head.in_features == 2880
    assert (
        sum(p.numel() for p in model.parameters())
        == 20 * (45 * 5 * 9 + 10) + 7 * (2880 * 2048 + 2 * 2048) + 2880 * 10 + 10
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (3, 4)}, "one number per stage"),
        ({"depths": (-1,)}, "depths must be at least 0"),
        ({"dense_depth": -1}, "depths must be at least 0"),
    ],
)
def test_bad_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_odd_channels_are_refused_by_name():
    with pytest.raises(ValueError, match="multiple of 2"):
        config(block="aol", channels=(5,)).build()
    with pytest.raises(ValueError, match="size must be"):
        published_architecture("huge")
    with pytest.raises(ValueError, match="has the bounds promised, not 'diagonal'"):
        config().build().certificate(bound="diagonal")


def test_checkpoints_bring_it_back(tmp_path):
    model = config().build()
    checkpoints.save_config(tmp_path, model.config, {})
    checkpoints.save_model(tmp_path, model)
    again = checkpoints.load_model(tmp_path)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(again(x), model(x))
    assert again.config == model.config
