"""Projected attacks: they break exactly what lies within reach, and never leave the ball."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from lben import margin_radius
from lben.evaluation.attacks import across_the_boundary, apgd_l2, auto_attack, pgd_l2, pgd_linf
from tests.lben.evaluation.attacks.models import CONFIG, Linear


def test_pgd_breaks_exactly_what_lies_within_reach_of_the_boundary():
    model, x = Linear(), 0.3 + 0.4 * torch.rand(50, 1, 4, 4, dtype=torch.float64)
    labels = model(x).argmax(1)
    distance = model.distance(x)
    radius = float(distance.median())
    adversarial, broken = pgd_l2(model, x, labels, radius)
    assert torch.equal(broken, distance <= radius) or (
        (broken != (distance <= radius)).sum() <= 1  # the median itself lies on the boundary
    )
    moved = (adversarial - x).flatten(1).norm(dim=1)
    assert (moved <= radius).all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert torch.equal(model(adversarial).argmax(1) != labels, broken)


def test_apgd_breaks_exactly_what_lies_within_reach_of_the_boundary():
    model, x = Linear(), 0.3 + 0.4 * torch.rand(50, 1, 4, 4, dtype=torch.float64)
    labels = model(x).argmax(1)
    distance = model.distance(x)
    radius = float(distance.sort()[0][25:27].mean())
    adversarial, broken = apgd_l2(model, x, labels, radius, steps=30)
    assert torch.equal(broken, distance <= radius)
    assert bool(((adversarial - x).flatten(1).norm(dim=1) <= radius).all())
    assert 0 <= float(adversarial.min()) <= float(adversarial.max()) <= 1


def test_apgd_finds_no_less_than_pgd():
    torch.manual_seed(3)
    model = CONFIG.build().double()
    x = torch.rand(100, 1, 4, 4, dtype=torch.float64)
    labels = model(x).argmax(1).detach()
    broken = [
        int(attack(model, x, labels, 0.25, steps=40, restarts=1)[1].sum())
        for attack in (pgd_l2, apgd_l2)
    ]
    assert 0 < broken[0] <= broken[1] + 1
    assert broken[1] < 100


def test_auto_attack_says_what_it_needs():
    model, x = CONFIG.build(), torch.rand(2, 1, 4, 4)
    with pytest.raises(ImportError, match="AutoAttack is not installed"):
        auto_attack(model, x, torch.tensor([0, 1]), 0.1)


def test_points_next_to_the_boundary_are_next_to_it():
    model = Linear()
    a, b = torch.rand(2, 60, 1, 4, 4, dtype=torch.float64)
    near, across = across_the_boundary(model, a, b, distance=1e-3)
    assert 10 < len(near) < 60
    assert bool((model(near).argmax(1) != model(across).argmax(1)).all())
    torch.testing.assert_close(model.distance(near), torch.full((len(near),), 1e-3).double())
    moved = (near - across).flatten(1).norm(dim=1)
    torch.testing.assert_close(moved, model.distance(near), rtol=1e-6, atol=0)


def test_pgd_is_as_strong_as_foolbox():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated imports inside foolbox
        import foolbox
    torch.manual_seed(2)
    model = CONFIG.build().eval()
    with torch.no_grad():
        model.layer.parameterization.b_y.zero_()
    x = torch.rand(100, 1, 4, 4)
    labels = model(x).argmax(1).detach()
    reference = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    radius = 0.3
    _, _, theirs = foolbox.attacks.L2PGD(steps=40)(reference, x, labels, epsilons=radius)
    _, ours = pgd_l2(model, x, labels, radius, generator=torch.Generator().manual_seed(0))
    assert 0 < int(ours.sum()) < 100
    assert int(ours.sum()) >= int(theirs.sum()) - 1


def test_bad_arguments():
    model, x = CONFIG.build(), torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match="radius must be at least 0, got -1"):
        pgd_l2(model, x, torch.tensor([0, 1]), -1.0)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        pgd_l2(model, x, torch.tensor([0, 9]), 0.1)


def test_pgd_in_inference_mode_finds_what_it_finds_outside():
    model, x, y = CONFIG.build(), torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    expected, _ = pgd_l2(model, x, y, 0.3, restarts=1)
    with torch.inference_mode():
        found, _ = pgd_l2(model, x.clone(), y.clone(), 0.3, restarts=1)
    assert torch.equal(expected, found)
    assert not found.is_inference()


def test_images_on_another_scale_need_their_range():
    model, x = Linear(), 0.5 + torch.rand(10, 1, 4, 4, dtype=torch.float64)
    labels = model(x).argmax(1)
    for attack in (pgd_l2, apgd_l2):
        with pytest.raises(ValueError, match=r"images must lie within \(0\.0, 1\.0\), got values"):
            attack(model, x, labels, 0.3)
        inside, _ = attack(model, x, labels, 0.3, bounds=(0.5, 1.5))
        assert 0.5 <= float(inside.min()) <= float(inside.max()) <= 1.5
        low = torch.full((1, 4, 4), 0.5, dtype=torch.float64)  # one number per pixel
        again, _ = attack(model, x, labels, 0.3, bounds=(low, 1.5))
        assert torch.equal(inside, again)
        outside, _ = attack(model, x, labels, 0.3, bounds=None)
        assert float(outside.min()) < 0.5 or float(outside.max()) > 1.5
        assert bool(((outside - x).flatten(1).norm(dim=1) <= 0.3).all())
    with pytest.raises(ValueError, match="low below high"):
        pgd_l2(model, x, labels, 0.3, bounds=(1.0, 0.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("radius", [0.0, 1e-30, 1e-6, 0.01, 0.3, 100.0])
def test_no_point_leaves_the_ball_by_a_rounding_error(dtype, radius):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).to(dtype)
    x, y = torch.rand(20, 1, 4, 4).to(dtype), torch.randint(3, (20,))
    for attack in (pgd_l2, apgd_l2):
        point, _ = attack(model, x, y, radius, steps=5, restarts=2)
        moved = [
            sum((int(p * 2**200) - int(q * 2**200)) ** 2 for p, q in zip(a, b, strict=True))
            for a, b in zip(
                point.double().flatten(1).tolist(), x.double().flatten(1).tolist(), strict=True
            )
        ]  # exact: numbers of all three types below 2 are integers times 2^-200
        assert max(moved) <= (int(radius * 2**200)) ** 2
        assert 0 <= float(point.min()) <= float(point.max()) <= 1


LABELS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint64, torch.bool]


@pytest.mark.parametrize("dtype", LABELS)
def test_labels_are_integers_of_any_type(dtype):
    model, x, y = Linear(), torch.rand(5, 1, 4, 4).double(), torch.tensor([0, 1, 1, 0, 1])
    expected = [attack(model, x, y, 0.3, restarts=1)[0] for attack in (pgd_l2, apgd_l2)]
    found = [attack(model, x, y.to(dtype), 0.3, restarts=1)[0] for attack in (pgd_l2, apgd_l2)]
    assert all(map(torch.equal, expected, found))
    logits = model(x).detach()
    assert torch.equal(margin_radius(logits, y, 1.0), margin_radius(logits, y.to(dtype), 1.0))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0.0, 1.0]), r"must be 2 integers, got \(2,\) torch\.float32"),
        (torch.tensor([0]), r"must be 2 integers, got \(1,\)"),
        (torch.tensor([[0], [1]]), r"must be 2 integers, got \(2, 1\)"),
        (torch.tensor([0, 2], dtype=torch.uint8), r"must lie in \[0, 2\), got values from 0 to 2"),
        (torch.tensor([-1, 0], dtype=torch.int8), r"got values from -1 to 0"),
        ([0, 1], "must be a Tensor of 2 integers, got a list"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    model, x = Linear(), torch.rand(2, 1, 4, 4).double()
    for call in (
        lambda: pgd_l2(model, x, labels, 0.1),
        lambda: apgd_l2(model, x, labels, 0.1),
        lambda: margin_radius(model(x), labels, 1.0),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("radius", "message"),
    [
        (float("nan"), "radius must be at least 0, got nan"),
        (float("inf"), "radius must be finite"),
        (-1e-300, "radius must be at least 0"),
        ("1", "radius must be a number, got '1'"),
        (True, "radius must be a number"),
    ],
)
def test_radii_that_are_none_are_refused(radius, message):
    for attack in (pgd_l2, apgd_l2):
        with pytest.raises(ValueError, match=message):
            attack(Linear(), torch.rand(2, 1, 4, 4).double(), torch.tensor([0, 1]), radius)


def test_numbers_of_numpy_and_torch_are_radii():
    model, x, y = Linear(), torch.rand(3, 1, 4, 4).double(), torch.tensor([0, 1, 0])
    expected, _ = pgd_l2(model, x, y, 0.25, restarts=1)
    for radius in (np.float32(0.25), torch.tensor(0.25)):
        assert torch.equal(pgd_l2(model, x, y, radius, restarts=1)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attacks_in_the_largest_norm_stay_in_ball_and_range(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 3)).to(dtype)
    x = torch.rand(20, 1, 3, 3, dtype=dtype)
    labels = model(x).argmax(1)
    found, broken = pgd_linf(model, x, labels, 0.2)
    assert bool(((found >= 0) & (found <= 1)).all())
    assert float((found.double() - x.double()).abs().max()) <= 0.2
    assert torch.equal(broken, model(found).argmax(1) != labels)


def test_attacks_in_the_largest_norm_find_the_least_radius_of_a_linear_model():
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 2).double()
    x = 0.5 + 0.01 * torch.randn(30, 6).double()
    y = model(x)
    labels, row = y.argmax(1), (model.weight[0] - model.weight[1]).detach()
    least = ((y[:, 0] - y[:, 1]).abs() / row.abs().sum()).detach()
    for factor, expected in ((0.98, False), (1.02, True)):
        results = [
            bool(pgd_linf(model, x[i : i + 1], labels[i : i + 1], factor * float(r))[1])
            for i, r in enumerate(least)
        ]
        assert all(result is expected for result in results)
