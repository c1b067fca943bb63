import warnings

import pytest
import torch
from torch import nn

from lben import EquilibriumClassifierConfig
from lben.attacks import (
    across_the_boundary,
    apgd_l2,
    ascend_quotient,
    auto_attack,
    corner_pairs,
    frozen,
    pgd_l2,
    quotients,
    random_pairs,
)

CONFIG = EquilibriumClassifierConfig(
    shape=(1, 4, 4), classes=3, mean=(0.5,), std=(0.5,), hidden=12, gamma=1.0, tol=1e-6
)


class Linear(nn.Module):
    """Two classes whose boundary is known in closed form."""

    def __init__(self):
        super().__init__()
        self.direction = nn.Parameter(torch.randn(16, dtype=torch.float64))
        self.offset = 0.5 * float(self.direction.detach().sum())

    def forward(self, x):
        score = x.flatten(1) @ self.direction - self.offset
        return torch.stack([score, -score], 1)

    def distance(self, x):
        with torch.no_grad():
            return (self(x)[:, 0] / self.direction.norm()).abs()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_corner_pairs_differ_and_stay_finite(dtype):
    x = torch.rand(10, 1, 4, 4, dtype=dtype)
    pairs = list(corner_pairs(x, torch.Generator().manual_seed(0)))
    distances = [float((a.double() - b.double()).abs().max()) for a, b in pairs]
    assert 0 < min(distances) < 1e-30
    assert max(distances) > 1e3
    assert all(bool(torch.isfinite(side).all()) for pair in pairs for side in pair)


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


def test_ascent_finds_the_constant_of_a_linear_map():
    model = Linear()
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    expected = float(model.direction.detach().norm()) * 2**0.5
    found = ascend_quotient(model, x, steps=20)
    assert float(found.quotient.max()) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(quotients(model, found.a, found.b), found.quotient)


def test_ascent_approaches_but_never_exceeds_the_bound():
    model = CONFIG.build().double()
    x = torch.rand(20, 1, 4, 4, dtype=torch.float64)
    found = ascend_quotient(model, x, steps=60)
    bound = model.certificate().bound
    assert found.quotient.max() <= bound
    assert found.quotient.max() > 0.5 * bound


def test_equal_points_have_quotient_zero():
    x = torch.rand(3, 1, 4, 4)
    assert quotients(CONFIG.build(), x, x).tolist() == [0, 0, 0]


def test_random_pairs_are_of_several_kinds_and_seeded():
    x = torch.rand(30, 1, 4, 4)
    batches = list(random_pairs(x, 20000, torch.Generator().manual_seed(0)))
    again = list(random_pairs(x, 20000, torch.Generator().manual_seed(0)))
    assert sum(len(a) for a, _ in batches) == 20000
    assert torch.equal(batches[3][1], again[3][1])
    distances = [(a - b).flatten(1).norm(dim=1).median() for a, b in batches]
    assert min(distances) < 0.01 < 1 < max(distances)


def test_frozen_restores_what_it_found():
    model = CONFIG.build()
    model.layer.parameterization.b.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == before


def test_bad_arguments():
    model, x = CONFIG.build(), torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match="radius must be at least 0, got -1"):
        pgd_l2(model, x, torch.tensor([0, 1]), -1.0)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        pgd_l2(model, x, torch.tensor([0, 9]), 0.1)
