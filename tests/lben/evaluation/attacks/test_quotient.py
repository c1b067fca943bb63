"""Quotients: the largest that is found nears the constant of a map and never exceeds its bound."""

import pytest
import torch

from lben import EquilibriumLinear
from lben.evaluation.attacks import ascend_quotient, corner_pairs, pgd_l2, quotients, random_pairs
from tests.lben.evaluation.attacks.models import CONFIG, Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_corner_pairs_differ_and_stay_finite(dtype):
    x = torch.rand(10, 1, 4, 4, dtype=dtype)
    pairs = list(corner_pairs(x, torch.Generator().manual_seed(0)))
    distances = [float((a.double() - b.double()).abs().max()) for a, b in pairs]
    assert 0 < min(distances) < 1e-30
    assert max(distances) > 1e3
    assert all(bool(torch.isfinite(side).all()) for pair in pairs for side in pair)


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


def test_vectors_of_a_layer_are_attacked():
    layer = EquilibriumLinear(6, 8, 3, dtype=torch.float64)
    x = torch.randn(30, 6, dtype=torch.float64)
    found = ascend_quotient(layer, x, steps=40)
    assert 0.5 < float(found.quotient.max()) <= layer.certificate().bound
    _, broken = pgd_l2(layer, x, layer(x).argmax(1), 1.0, bounds=None)
    assert 0 < int(broken.sum()) < 30
