import pytest
import torch

from lben import EquilibriumClassifierConfig
from lben.models.equilibrium import activation
from solvers import LeakyReLU, ReLU, Tanh

CONFIG = EquilibriumClassifierConfig(
    shape=(1, 4, 4), classes=3, mean=(0.3,), std=(0.25,), hidden=9, gamma=0.5
)


def images(count=8, dtype=torch.float64):
    return torch.rand(count, 1, 4, 4, dtype=dtype)


def test_bound_counts_the_normalization():
    model = CONFIG.build().double()
    certificate = model.certificate()
    assert certificate.bound == pytest.approx(0.5 / 0.25)
    assert certificate.bound >= 2.0
    assert model.certificate(tightened=True).bound <= certificate.bound


def test_radius_holds_under_perturbation_and_pays_for_an_inexact_solve():
    model = CONFIG.build().double().requires_grad_(False)
    x = images(200)
    labels = model(x).argmax(1)
    model.layer.tol = 1e-10
    radius = model.certified_radius(x, labels)
    assert radius.max() > 0
    model.layer.tol = 1e-1
    assert (model.certified_radius(x, labels) <= radius + 1e-9).all()
    model.layer.tol = 1e-10
    direction = torch.randn_like(x)
    moved = x + 0.999 * radius[:, None, None, None] * direction / direction.flatten(1).norm(
        dim=1
    ).reshape(-1, 1, 1, 1)
    held = model(moved).argmax(1) == labels
    assert held[radius > 0].all()


def test_misclassified_samples_have_no_radius():
    model = CONFIG.build().double()
    x = images()
    with torch.no_grad():
        wrong = (model(x).argmax(1) + 1) % 3
    assert (model.certified_radius(x, wrong) == 0).all()


def test_certified_logits_are_near_the_exact_ones():
    model = CONFIG.build().double().requires_grad_(False)
    x = images(50)
    model.layer.tol = 1e-13
    exact = model(x)
    for tol in (1e-2, 1e-6):
        model.layer.tol = tol
        result = model.certified_logits(x, model.certificate())
        assert ((result.logits - exact).norm(dim=1) <= result.error + 1e-11).all()


def test_certified_logits_need_float64():
    model = CONFIG.build()
    with pytest.raises(ValueError, match=r"evaluated in float64.*use model\.double\(\)"):
        model.certified_logits(images(dtype=torch.float32), model.certificate())


@pytest.mark.parametrize("shape", [(8, 16), (8, 1, 4, 5), (1, 4, 4)])
def test_wrong_image_shapes_are_named(shape):
    with pytest.raises(ValueError, match=r"expected images of shape \(batch, 1, 4, 4\)"):
        CONFIG.build()(torch.zeros(shape))


def test_labels_out_of_range_are_named():
    model = CONFIG.build().double()
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        model.certified_radius(images(2), torch.tensor([0, 3]))


def test_activations_by_name():
    assert (activation("relu"), activation("tanh")) == (ReLU(), Tanh())
    assert activation("leaky_relu") == LeakyReLU()
    with pytest.raises(ValueError, match="activation must be one of relu, leaky_relu, tanh"):
        activation("gelu")
