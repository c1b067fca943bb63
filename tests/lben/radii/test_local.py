"""Proofs around single inputs: never below the global ones, never wrong, refused where false."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from lben import (
    CertificateError,
    DenseWeights,
    EquilibriumClassifierConfig,
    EquilibriumLinear,
)
from lben.evaluation.attacks import pgd_l2
from lben.radii.error_bounds import Affine
from lben.radii.local import LocalCertifier, OperatingPoints
from lben.radii.margin import margin_radius
from solvers import LeakyReLU, ReLU, Tanh

CONFIG = EquilibriumClassifierConfig(
    shape=(1, 4, 4), classes=3, mean=(0.5,), std=(0.25,), hidden=12, gamma=6.0
)


def model(seed=0, activation="relu", feedthrough=False):
    torch.manual_seed(seed)
    config = dataclasses.replace(CONFIG, activation=activation, feedthrough=feedthrough)
    built = config.build().double()
    with torch.no_grad():
        for p in built.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return built.to_exact(1e-9).requires_grad_(False)


@pytest.fixture(params=[("relu", False), ("leaky_relu", False), ("tanh", False), ("relu", True)])
def case(request):
    net = model(3, *request.param)
    x = torch.rand(60, 1, 4, 4, dtype=torch.float64)
    labels = net(x).argmax(1)
    certificate = net.certificate(bound="diagonal")
    local = net.local_certifier(certificate)
    operating_points = net.operating_points(x, certificate, local)
    start = margin_radius(
        operating_points.logits,
        labels,
        certificate.radius_bound(),
        logit_error=operating_points.logit_error,
    )
    return net, x, labels, local, operating_points, start


def test_local_radii_are_larger_and_withstand_attacks(case):
    net, x, labels, local, operating_points, start = case
    radius = local.radius(operating_points, labels, start, steps=5)
    assert bool((radius >= start).all())
    assert float((radius / start).max()) > 1.1
    for share in (0.5, 1.0):
        index = (radius > 0).nonzero()[:, 0]
        for i in index.tolist()[:8]:
            part = slice(i, i + 1)
            _, broken = pgd_l2(net, x[part], labels[part], share * float(radius[i]), steps=15)
            assert not bool(broken.any())


def test_local_certificates_are_not_far_from_attacks():
    """Bounds that were far too large would pass every attack."""
    net = model(1)
    x = torch.rand(40, 1, 4, 4, dtype=torch.float64)
    labels = net(x).argmax(1)
    certificate = net.certificate(bound="diagonal")
    local = net.local_certifier(certificate)
    operating_points = net.operating_points(x, certificate, local)
    start = margin_radius(operating_points.logits, labels, certificate.radius_bound())
    radius = local.radius(operating_points, labels, start, steps=8)
    broken = [
        bool(pgd_l2(net, x[i : i + 1], labels[i : i + 1], 1.5 * float(r), steps=30)[1])
        for i, r in enumerate(radius)
    ]
    assert sum(broken) > 10


def test_lines_enlarge_radii_that_withstand_attacks():
    """Nothing but σ is one-sided here: the inputs may go anywhere."""
    net = model(3)
    x = torch.rand(60, 1, 4, 4, dtype=torch.float64)
    labels, certificate = net(x).argmax(1), net.certificate(bound="diagonal")
    local = net.local_certifier(certificate)
    operating_points = net.operating_points(x, certificate, local)
    start = margin_radius(operating_points.logits, labels, certificate.radius_bound()) * (1 - 1e-6)
    plain = local.radius(operating_points, labels, start, steps=6)
    radius = local.radius(operating_points, labels, start, steps=6, constraints=True)
    assert float((radius / plain).min()) > 0.98  # the programs stop at a gap
    assert float((radius / plain).max()) > 1.02
    for i in (radius / plain).argsort(descending=True)[:12].tolist():
        part, share = slice(i, i + 1), (1.0, 0.9)
        for s in share:
            _, broken = pgd_l2(net, x[part], labels[part], s * float(radius[i]), steps=25)
            assert not bool(broken.any())


@pytest.mark.parametrize("activation", [ReLU(), LeakyReLU(0.3)])
def test_lines_are_below(activation):
    v = torch.linspace(-2, 2, 41, dtype=torch.float64)
    lines = activation.lower_lines(v, torch.full_like(v, 0.15))
    touched = torch.zeros_like(v)
    for s, o in lines:
        assert torch.equal(o == 0, v > 0.15 if s == 1 else v < -0.15)
        for p in (v - 0.15, v + 0.15):
            for t in torch.linspace(-3, 3, 31, dtype=torch.float64):
                excess = activation(p + t) - (activation(p) + s * t - o)
                assert float(excess.min()) >= -1e-15
                touched += excess < 1e-13
    assert len(lines) == 2
    assert bool((touched > 0).all())
    assert Tanh().lower_lines(v, 0 * v) == ()


def test_weights_of_constraints_are_not_trusted(monkeypatch):
    """Weights of the wrong sign, of nothing known, or without their price would show anything."""
    eye = torch.eye(2, dtype=torch.float64)
    zero, much = 0 * eye, 4.0 * torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double()

    def shows(place, value, C, D, rise=1.0):
        """y = (1, 0) at x = 0, and z = max(x, 0): the label changes within 0.2."""
        weights = DenseWeights(
            W=zero, U=eye, b=zero[0], C=C, D=D, b_y=eye[0], Lambda=eye.sum(0), gamma=None
        )
        slack = torch.tensor([[[0.0, 0.0], [rise, rise]]]).double()
        operating_points = OperatingPoints(
            v=zero[:1], v_error=zero[:1], logits=eye[:1], logit_error=zero[0, :1], box_slack=slack
        )
        proposal = torch.zeros(1, 8).double()
        proposal[:, place : place + 2] = value
        monkeypatch.setattr(
            "lben.radii.local.tighten_with_constraints",
            lambda problem, lines, box_slack, target: (target, 0.1 + zero[:1], proposal),
        )
        return bool(
            LocalCertifier(weights, ReLU()).certifies(operating_points, torch.tensor([0]), 1.0)
        )

    assert not shows(0, -4.0, much, None)
    assert not shows(4, -4.0, zero, much)
    assert shows(6, 4.0, zero, much, rise=0.1)  # as it should: x cannot rise further
    for value in (4.0, np.nan, -np.inf, np.inf):
        assert not shows(6, value, zero, much)
        assert not shows(6, value, zero, much, rise=np.inf)


def test_radii_that_are_not_numbers_are_refused(case):
    _, _, labels, local, operating_points, _ = case
    for radius in (float("nan"), -1.0):
        with pytest.raises(ValueError, match="a radius must be"):
            local.certifies(operating_points, labels, radius)
    assert not bool(local.certifies(operating_points, labels, float("inf")).any())


def test_training_on_does_not_change_a_proof():
    torch.manual_seed(0)
    layer = EquilibriumLinear(4, 5, 3, gamma=2.0, dtype=torch.float64)
    local = LocalCertifier(layer.weights(), ReLU())
    v, logits = torch.randn(20, 5).double(), torch.randn(20, 3).double()
    operating_points = OperatingPoints(v=v, v_error=0 * v, logits=logits, logit_error=0 * v[:, 0])
    held = local.certifies(operating_points, logits.argmax(1), 0.5)
    assert 0 < int(held.sum()) < 20
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.0)
    assert torch.equal(local.certifies(operating_points, logits.argmax(1), 0.5), held)


def test_box_slack_without_constraints_is_refused(case):
    _, _, labels, local, operating_points, start = case
    faced = dataclasses.replace(
        operating_points, box_slack=torch.zeros(60, 2, 16, dtype=torch.float64)
    )
    with pytest.raises(ValueError, match="have box_slack, which is a constraint"):
        local.certifies(faced, labels, start, constraints=False)


def test_a_larger_radius_is_never_easier(case):
    _, _, labels, local, operating_points, start = case
    held = [
        local.certifies(operating_points, labels, factor * start) for factor in (0.9, 1.1, 1.5, 2.5)
    ]
    assert bool(held[0].all())
    for smaller, larger in itertools.pairwise(held):
        assert bool((smaller | ~larger).all())
    assert not bool(held[-1].all())


def test_images_that_stay_in_their_range_have_larger_radii(case):
    """Attacks stay in [0, 1] too; half of the pixels are 0 or 1."""
    net, x, _, local, *_ = case
    x = (1.6 * x - 0.3).clamp(0, 1)
    labels, certificate = net(x).argmax(1), net.certificate(bound="diagonal")
    anywhere = net.operating_points(x, certificate, local)
    inside = net.operating_points(x, certificate, local, pixels=True)
    start = margin_radius(anywhere.logits, labels, certificate.radius_bound())
    start = start * (1 - 1e-6)
    wide, wider = (local.radius(a, labels, start, steps=5) for a in (anywhere, inside))
    assert float((wider / wide).min()) > 0.98  # the programs stop at a gap
    assert float((wider / wide).max()) > 1.02
    for i in range(12):
        part = slice(i, i + 1)
        _, broken = pgd_l2(net, x[part], labels[part], float(wider[i]), steps=15)
        assert not bool(broken.any())


def test_box_slack_helps_exactly_where_it_should():
    """y = (1, 4(x₁ − x₂)) at x = 0: without x₁ rising or x₂ falling the label cannot change."""
    eye = torch.eye(2, dtype=torch.float64)
    weights = DenseWeights(
        W=0 * eye, U=eye, b=torch.full((2,), 9.0).double(),
        C=torch.tensor([[0.0, 0.0], [4.0, -4.0]]).double(), D=None,
        b_y=torch.tensor([1.0, 0.0]).double(), Lambda=torch.ones(2).double(), gamma=None,
    )  # fmt: skip
    local = LocalCertifier(weights, ReLU())
    v, y = 9 + 0 * eye[:1], torch.tensor([[1.0, 0.0]]).double()
    label, distance = torch.tensor([0]), 1 / 32**0.5

    def held(radius, fall=(np.inf, np.inf), rise=(np.inf, np.inf)):
        slack = torch.tensor([[fall, rise]]).double()
        operating_points = OperatingPoints(
            v=v, v_error=0 * v, logits=y, logit_error=0 * v[:, 0], box_slack=slack
        )
        return bool(local.certifies(operating_points, label, radius))

    free = OperatingPoints(v=v, v_error=0 * v, logits=y, logit_error=0 * v[:, 0])
    for radius in (0.97 * distance, 1.03 * distance):
        assert bool(local.certifies(free, label, radius)) == held(radius) == (radius < distance)
    assert not held(1.03 * distance, fall=(0, np.inf), rise=(np.inf, 0))
    assert held(2 * distance, fall=(np.inf, 0), rise=(0, np.inf))
    assert held(1.2 * distance, rise=(0, np.inf))
    assert not held(1.45 * distance, rise=(0, np.inf))
    # With x₁ ≤ 0.05 the boundary is at x = (0.05, −0.2).
    away = (0.05**2 + 0.2**2) ** 0.5
    assert held(0.97 * away, rise=(0.05, np.inf))
    assert not held(1.03 * away, rise=(0.05, np.inf))


def test_errors_of_the_anchor_cost_radius(case):
    _, _, labels, local, operating_points, start = case
    blurred = dataclasses.replace(operating_points, v_error=operating_points.v_error + 100.0)
    sharp, dull = (
        sum(int(local.certifies(a, labels, f * start).sum()) for f in (1.05, 1.2, 1.4))
        for a in (operating_points, blurred)
    )
    assert dull < sharp
    wrong = dataclasses.replace(operating_points, logit_error=operating_points.logit_error + 100.0)
    assert not bool(local.certifies(wrong, labels, 0.5 * start).any())
    assert not bool(local.certifies(operating_points, (labels + 1) % 3, 1e-9).any())


def test_gains_bound_every_pre_activation(case):
    net, x, _, local, operating_points, _ = case
    certificate = net.certificate(bound="diagonal")
    moved = x + 0.3 * torch.randn_like(x)
    other = net.operating_points(moved, certificate, local)
    distance = (moved - x).flatten(1).norm(dim=1) * net.normalize.gain
    quotient = (other.v - operating_points.v).abs() / distance[:, None]
    assert bool((quotient <= local.gains).all())
    assert float((quotient / local.gains).max()) > 0.2


def test_what_local_proofs_need_is_said():
    net = model()
    with pytest.raises(ValueError, match="finite bound"):
        dataclasses.replace(CONFIG, gamma=None).build().double().local_certifier(
            dataclasses.replace(CONFIG, gamma=None).build().double().certificate()
        )
    with pytest.raises(CertificateError, match="other weights"):
        net.local_certifier(model(5).certificate())
    other, x = model(5), torch.rand(1, 1, 4, 4, dtype=torch.float64)
    local = net.local_certifier(net.certificate())
    with pytest.raises(CertificateError, match="other weights"):
        other.operating_points(x, other.certificate(), local)
    weights = net.layer.weights()
    with pytest.raises(CertificateError, match="not positive definite"):
        LocalCertifier(dataclasses.replace(weights, W=9 * weights.W.abs()), ReLU())


def test_extremes_of_range_prove_nothing_false():
    """y = 0.9x at the least positive margin and radius, with pixels 1.4 times as large."""
    one, least = torch.ones(1, 1).double(), 5e-324
    weights = DenseWeights(
        W=0 * one, U=one, b=0 * one[0], C=torch.zeros(2, 1).double(),
        D=torch.tensor([[0.9], [0.0]]).double(), b_y=torch.zeros(2).double(), Lambda=one[0],
        gamma=None,
    )  # fmt: skip
    local = LocalCertifier(weights, ReLU(), input_gain=1.4)
    for scale in (1.0, 1e300):
        operating_points = OperatingPoints(
            v=one, v_error=0 * one, logit_error=0 * one[0],
            logits=torch.tensor([[least * scale, 0.0]], dtype=torch.float64),
        )  # fmt: skip
        assert not bool(local.certifies(operating_points, torch.tensor([0]), least * scale))


def test_units_that_see_no_input_have_proofs():
    eye = torch.eye(2, dtype=torch.float64)
    weights = DenseWeights(
        W=0.5 * eye, U=0 * eye, b=eye[0], C=eye, D=None, b_y=0 * eye[0], Lambda=eye.sum(0),
        gamma=None,
    )  # fmt: skip
    local = LocalCertifier(weights, ReLU())
    assert 0 < float(local.gains.max()) < 1e-6
    operating_points = OperatingPoints(
        v=eye[:1], v_error=0 * eye[:1], logits=eye[:1], logit_error=torch.zeros(1).double()
    )
    assert bool(local.certifies(operating_points, torch.tensor([0]), 1e3))


def pieces(seed=0):
    net = model(seed)
    certificate = net.certificate(bound="scaled")
    local = net.local_certifier(certificate)
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    return net, certificate, local, x, net(x).argmax(1)


REPLACED = {
    "slope": lambda net: setattr(net.layer, "activation", LeakyReLU(0.9)),
    "class": lambda net: setattr(net.layer, "activation", Tanh()),
    "bias": lambda net: net.layer.parameterization.b.data.add_(1.0),
    "deviation": lambda net: net.normalize.std.mul_(2.0),
}


@pytest.mark.parametrize("what", REPLACED)
def test_local_proofs_are_of_one_activation_and_normalisation(what):
    net, certificate, local, x, labels = pieces()
    before = net.operating_points(x, certificate, local)
    assert bool((local.radius(before, labels, torch.full((5,), 1e-3), steps=1) >= 1e-3).all())
    REPLACED[what](net)
    with pytest.raises(CertificateError, match="for another network"):
        net.operating_points(x, certificate, local)
    other = net.local_certifier(net.certificate(bound="scaled"))
    assert other.fingerprint != local.fingerprint
    with pytest.raises(CertificateError, match="another activation or another normalisation"):
        other.certifies(before, labels, 1e-3)
    with pytest.raises(CertificateError, match="another activation or another normalisation"):
        other.radius(before, labels, torch.full((5,), 1e-3))


def test_what_a_local_proof_does_not_depend_on():
    net, certificate, local, x, labels = pieces()
    weights = net.layer.weights()
    claims = dataclasses.replace(weights, gamma=None, Lambda=2 * weights.Lambda)
    same = LocalCertifier(claims, ReLU(), certificate.bound, input_gain=net.normalize.gain)
    assert same.fingerprint == local.fingerprint
    operating_points = net.operating_points(x, certificate, same)
    assert bool(same.certifies(operating_points, labels, 0.0).all())
    # OperatingPoints of the layer do not know what comes before it, and fit every gain.
    bare = net.layer.operating_points(net.normalize(x).flatten(1), certificate.layers[-1])
    assert bool(local.certifies(bare, labels, 0.0).all())


@dataclasses.dataclass(frozen=True, eq=False)
class Scaled(ReLU):
    """An activation whose numbers are a tensor that may be written to."""

    slopes: torch.Tensor


def test_activations_are_told_apart_by_their_tensors():
    eye = torch.eye(2, dtype=torch.float64)
    weights = DenseWeights(
        W=0 * eye, U=eye, b=0 * eye[0], C=eye, D=None, b_y=0 * eye[0], Lambda=eye.sum(0), gamma=2.0
    )
    first, second = Scaled(eye[0].clone()), Scaled(eye[1].clone())
    one, other = LocalCertifier(weights, first), LocalCertifier(weights, second)
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint == LocalCertifier(weights, Scaled(eye[0].clone())).fingerprint
    first.slopes.zero_()  # what was proved stays what it was
    assert one.fingerprint != LocalCertifier(weights, first).fingerprint


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(dtype):
    net, certificate, local, x, labels = pieces()
    operating_points = net.operating_points(x, certificate, local)
    for radius in (0.0, 1e-3, 0.3):
        found = local.certifies(operating_points, labels.to(dtype), radius)
        assert torch.equal(found, local.certifies(operating_points, labels, radius))


def test_radii_and_anchors_that_are_no_numbers():
    net, certificate, local, x, labels = pieces()
    operating_points = net.operating_points(x, certificate, local)
    for constraints in (False, True):
        assert not bool(
            local.certifies(operating_points, labels, math.inf, constraints=constraints).any()
        )
        assert not bool(
            local.certifies(operating_points, labels, 1e300, constraints=constraints).any()
        )
    with pytest.raises(ValueError, match="one for all or 5"):
        local.certifies(operating_points, labels, torch.zeros(4))
    for bad in (math.nan, -1.0):
        with pytest.raises(ValueError, match="start must be 5 radii"):
            local.radius(operating_points, labels, torch.full((5,), bad))
    with pytest.raises(ValueError, match="v of the operating_points contains NaN"):
        local.certifies(
            dataclasses.replace(operating_points, v=math.nan * operating_points.v), labels, 0.1
        )
    with pytest.raises(ValueError, match="v of the operating_points must be"):
        local.certifies(
            dataclasses.replace(operating_points, v=operating_points.v.float()), labels, 0.1
        )
    for gain in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="input_gain must be positive"):
            LocalCertifier(net.layer.weights(), ReLU(), input_gain=gain)


def test_errors_around_a_layer_are_in_terms_of_what_it_takes():
    layer = EquilibriumLinear(3, 4, 2, dtype=torch.float64).requires_grad_(False)
    operating_points = layer.operating_points(
        torch.ones(1, 3, dtype=torch.float64), layer.certificate()
    )
    label, gain = operating_points.logits.argmax(1), 10.0
    local = LocalCertifier(layer.weights(), layer.activation, 1.0, input_gain=gain)
    margin = float(operating_points.logits.amax() - operating_points.logits.amin())
    radius = 1e-3 * margin
    assert bool(local.certifies(operating_points, label, radius))
    nothing = torch.zeros(1, dtype=torch.float64)
    for slope, held in ((30.0, True), (90.0, False)):  # √2 · slope · gain · radius against margin
        known = dataclasses.replace(operating_points, elsewhere=Affine(nothing, slope))
        assert bool(local.certifies(known, label, radius)) is held
