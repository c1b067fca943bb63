import warnings

import pytest
import torch
from torch import nn

from lben import EquilibriumClassifierConfig
from lben.attacks import ascend_quotient, frozen, pgd_l2, quotients, random_pairs

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
