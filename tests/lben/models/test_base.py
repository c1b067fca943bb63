"""A classifier of a user's own is certified as those of lben are, module by module."""

import warnings

import pytest
import torch
from torch import nn

from lben import CertificateError, EquilibriumLinear, Flatten, Normalize, certify
from lben.evaluation.attacks import pgd_l2
from lben.models import Classifier, EquilibriumClassifierConfig
from tests.lben.layers.foreign import Louder, Silent, Stretch

SHAPE = (1, 4, 4)


class Own(Classifier):
    """Normalisation, a module of a user's own between maps, and an equilibrium layer."""

    def __init__(self, module):
        super().__init__(SHAPE, (0.4,), (0.5,))
        self.flatten, self.module = Flatten(), module
        self.layer = EquilibriumLinear(16, 12, 3, gamma=2.0, tol=1e-6)

    @property
    def stages(self):
        return self.normalize, self.flatten, self.module, self.layer

    @property
    def gamma(self):
        return None


def build(module):
    torch.manual_seed(0)
    model = Own(module).eval().requires_grad_(False)
    x = torch.rand(40, *SHAPE)
    return model, x, model(x).argmax(1)


def test_a_module_of_a_users_own_is_a_stage():
    model, x, labels = build(Stretch(3.0))
    certificate = model.certificate()
    assert certify(model) == certificate
    assert [leaf.bound for leaf in certificate.layers] == pytest.approx([2.0, 1.0, 3.0, 2.0])
    assert certificate.bound == pytest.approx(12.0)
    found = model.forward_with_error(x, certificate)
    assert torch.equal(found.value, model(x))
    exact = model.to_exact(1e-12)
    away = (found.value.double() - exact(x.double())).norm(dim=1)
    assert (away <= found.error + 1e-9).all()
    radius = found.radius(labels, certificate)
    assert torch.equal(radius, model.certified_radius(x, labels))
    assert int((radius > 1e-3).sum()) > 10
    for i in radius.argsort(descending=True)[:5].tolist():
        one, label = x[i : i + 1], labels[i : i + 1]
        assert not pgd_l2(model, one, label, 0.999 * float(radius[i]))[1].any()
    model.module.factor = 30.0
    with pytest.raises(CertificateError, match="for another network"):
        model.certified_radius(x, labels, certificate)


@pytest.mark.parametrize(("module", "error", "message"), [
    (nn.Identity(), ValueError, "Identity has no proved Lipschitz bound"),
    (Louder(), CertificateError, "Louder extends a map of lben"),
])  # fmt: skip
def test_a_stage_without_a_certificate_is_refused_by_name(module, error, message):
    model, x, labels = build(module)
    for call in (
        model.certificate,
        lambda: certify(model),
        lambda: model.certified_radius(x, labels),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_stage_that_knows_nothing_around_x_certifies_nothing_of_what_runs_and_says_so():
    model, x, labels = build(Silent(3.0))
    certificate = model.certificate()
    found = model.forward_with_error(x, certificate)
    assert found.error.isfinite().all()
    with pytest.warns(UserWarning, match="no radius is certified"):
        running = found.radius(labels, certificate)
    assert not running.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = found.radius(labels, certificate, "exact")
        textbook = found.radius(labels, certificate, "textbook")
    assert float(exact.max()) > 0
    assert (exact <= textbook).all()


def test_images_that_are_off_cost_the_bound_of_the_network():
    model, x, labels = build(Stretch(3.0))
    certificate = model.certificate()
    own, off = (model.forward_with_error(x, certificate, e) for e in (0.0, 0.01))
    assert (off.error >= 0.01 * certificate.bound + own.error).all()
    step = torch.randn_like(x)
    step *= 0.01 * (1 - 1e-5) / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    there = model.to_exact(1e-12)(x.double() + step.double())
    assert ((off.value.double() - there).norm(dim=1) <= off.error).all()
    assert (off.radius(labels, certificate) <= own.radius(labels, certificate)).all()


def test_another_normalisation_is_a_bounded_module_or_refused():
    model, *_ = build(Stretch(1.0))
    before = model.certificate()
    model.normalize = Normalize((0.4,), (0.25,))
    assert model.certificate().bound == pytest.approx(2 * before.bound)
    model.normalize = nn.Identity()
    with pytest.raises(ValueError, match="Identity has no proved"):
        model.certificate()


def test_image_sizes_and_bounds_are_checked():
    model = EquilibriumClassifierConfig(
        shape=SHAPE, classes=3, mean=(0.5,), std=(0.5,), hidden=5
    ).build()
    assert model.certificate((4, 4)) == model.certificate(SHAPE) == model.certificate()
    with pytest.raises(ValueError, match=r"made for images of \(4, 4\), got \(5, 5\)"):
        model.certificate((5, 5))
    with pytest.raises(ValueError, match="not 'least'"):
        model.certificate(bound="least")
    with pytest.raises(ValueError, match=r"lben\.data\.pixels"):
        model(torch.zeros(2, *SHAPE, dtype=torch.uint8))


def test_copies_for_evaluation_raise_and_leave_the_model():
    model, x, _ = build(Stretch(1.0))
    frozen, exact = model.freeze(1e-5), model.to_exact(1e-10)
    assert (frozen.tol, exact.tol, model.tol) == (1e-5, 1e-10, 1e-6)
    assert frozen.layer.on_failure == exact.layer.on_failure == "raise"
    assert (frozen.dtype, exact.dtype) == (torch.float32, torch.float64)
    assert model.layer.on_failure == "warn"
    torch.testing.assert_close(exact(x.double()).float(), model(x), rtol=1e-4, atol=1e-5)
