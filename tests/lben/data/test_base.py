"""Data of your own: what a data set takes, counts and refuses."""

import dataclasses

import numpy as np
import pytest
import torch

from lben.data import Dataset, load, pixels

IMAGES, LABELS = torch.zeros(6, 1, 4, 4, dtype=torch.uint8), torch.arange(6) % 3


def own(**changes):
    return Dataset(**{
        "name": "mine", "train_images": IMAGES, "train_labels": LABELS, "test_images": IMAGES,
        "test_labels": LABELS, "classes": 3, "mean": (0.3,), "std": (0.2,), **changes,
    })  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_labels_of_any_integer_type_become_int64(dtype):
    found = own(train_labels=LABELS.to(dtype), test_labels=LABELS.to(dtype))
    assert torch.equal(found.train_labels, LABELS)
    assert found.test_labels.dtype == torch.int64


def test_numbers_of_arrays_become_plain():
    found = own(mean=np.array([0.25], np.float32), std=[torch.tensor(0.5)], classes=np.int64(3))
    assert (found.mean, found.std, found.classes) == ((0.25,), (0.5,), 3)
    assert found.shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_images": IMAGES / 255},
            r"train_images must be a uint8 Tensor .* got torch\.float",
        ),
        ({"test_images": IMAGES.numpy()}, "test_images must be a uint8 Tensor .* got ndarray"),
        ({"test_images": IMAGES[:, 0]}, r"test_images must be samples × channels .* \(6, 4, 4\)"),
        ({"test_images": IMAGES[:, :, :3]}, "they must have one shape"),
        ({"train_labels": LABELS[:5]}, r"train_labels must be a Tensor of 6 integers, got \(5,\)"),
        ({"test_labels": LABELS.float()}, r"test_labels must be .* torch\.float32"),
        (
            {"test_labels": LABELS.tolist()},
            "test_labels must be a Tensor of 6 integers, got 'list'",
        ),
        ({"test_labels": LABELS + 1}, r"test_labels must lie in \[0, 3\), got values from 1 to 3"),
        ({"train_labels": (LABELS - 1).to(torch.int8)}, "got values from -1 to 1"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"mean": (0.1, 0.2)}, "mean must be one finite number for each of 1 channels"),
        ({"std": (0.0,)}, "std must be positive"),
        ({"std": "1"}, "std must be a tuple"),
    ],
)
def test_data_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        own(**changes)


def test_floats_are_not_scaled_again():
    with pytest.raises(ValueError, match=r"got torch\.float32: floats in \[0, 1\] are pixels"):
        pixels(torch.rand(2, 1, 4, 4))
    assert pixels(torch.tensor([255], dtype=torch.uint8)).tolist() == [1.0]


def test_statistics_are_those_of_the_training_images():
    images = torch.randint(0, 256, (50, 3, 5, 4), dtype=torch.uint8)
    labels = torch.arange(50) % 7
    made = Dataset.from_tensors(images, labels, images[:9], labels[:9], name="mine")
    scaled = pixels(images, torch.float64)
    assert made.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert made.std == pytest.approx(scaled.std((0, 2, 3)).tolist(), rel=1e-12)
    assert (made.name, made.classes, made.shape) == ("mine", 7, (3, 5, 4))
    assert Dataset.from_tensors(images, labels, images[:0], labels[:0], classes=9).classes == 9


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES, LABELS, r"channel 0 of train_images \(\(6, 1, 4, 4\)\) has no standard deviation"),
        (IMAGES[:0], LABELS[:0], "it is constant or there are no images"),
        (IMAGES.float(), LABELS, "train_images must be a uint8 Tensor"),
        (IMAGES.numpy(), LABELS, "train_images must be a uint8 Tensor .* got ndarray"),
        (IMAGES[0], LABELS, "samples × channels × height × width"),
    ],
)
def test_tensors_without_statistics_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Dataset.from_tensors(images, labels, IMAGES, LABELS)


def test_labels_of_tensors_are_checked():
    images = torch.arange(96, dtype=torch.uint8).reshape(6, 1, 4, 4)
    for labels, message in (
        (LABELS.tolist(), "train_labels must be a Tensor of 6 integers, got 'list'"),
        (LABELS[:2], r"train_labels must be a Tensor of 6 integers, got \(2,\)"),
        (LABELS / 2, r"train_labels must be a Tensor of 6 integers, got .* torch\.float32"),
        (LABELS - 1, "must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            Dataset.from_tensors(images, labels, images, LABELS)


def test_a_fingerprint_is_of_all_but_the_name():
    data = load("digits")
    assert dataclasses.replace(data, name="other").fingerprint == data.fingerprint
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        changed = getattr(data, name).flip(0)
        assert dataclasses.replace(data, **{name: changed}).fingerprint != data.fingerprint
    for name, value in (("classes", 11), ("mean", (0.3,)), ("std", (0.3,))):
        assert dataclasses.replace(data, **{name: value}).fingerprint != data.fingerprint
    empty = dataclasses.replace(data, test_images=data.test_images[:0], test_labels=LABELS[:0])
    assert empty.fingerprint != data.fingerprint
