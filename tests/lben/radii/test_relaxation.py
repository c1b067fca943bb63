"""Balls around images are certified, and no attack changes a label within."""

import math

import pytest
import torch

from lben.certificates.certificate import Certificate, CertificateError
from lben.certificates.relaxation import InputRegion
from lben.radii.relaxation import BallCertificate, certify_balls, find_ball_radii
from lben.tightening.descent import find_smallest
from lben.weights.activation import RELU
from lben.weights.affine_system import AffineSystem
from tests.lben.certificates.test_relaxation import SETS, sample
from tests.lben.radii.test_ranges import NAMES, system_of
from tests.lben.weights.test_affine_system import equilibrium


def images(system: AffineSystem, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and the labels that the network gives them."""
    x = torch.rand(count, system.inputs)
    return x, system.evaluate(x.double())[-1].argmax(1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("norm", "box"), SETS)
def test_no_label_changes_within_a_certified_radius(name, norm, box):
    system = system_of(name)
    x, labels = images(system, 3)
    radii = find_ball_radii(system, x, labels, norm=norm, box=box, seconds=0.1, bisections=2)
    assert (radii > 0).all()
    for i in range(len(x)):
        region = InputRegion.around(x[[i]], float(radii[i]), norm, box)
        y = system.evaluate(sample(region, 500))[-1]
        assert (y.argmax(1) == labels[i]).all()
        for j in range(y.shape[1]):
            if j != labels[i]:
                target = torch.zeros(1, y.shape[1]).double()
                target[0, labels[i]], target[0, j] = 1, -1
                assert find_smallest(system, target, region) > 0


def test_branch_and_bound_adds_to_the_radius():
    system = system_of("chain")
    x, labels = images(system)
    cheap, dear = (
        find_ball_radii(system, x, labels, norm="l2", box=None, seconds=seconds)
        for seconds in (0.0, 1.0)
    )
    assert (dear >= cheap).all()
    assert dear.sum() > 1.05 * cheap.sum()


def test_certificates_say_what_is_proved():
    system = system_of("chain")
    x, labels = images(system)
    wrong = (labels + 1) % 3
    radius = torch.full((6,), 1e-3)
    proofs = certify_balls(system, x, labels, radius, norm="linf", box=(0.0, 1.0), seconds=0.0)
    for i, proof in enumerate(proofs):
        assert proof is not None
        assert (proof.norm, proof.box, proof.label) == ("linf", (0.0, 1.0), int(labels[i]))
        assert proof.fingerprint == system.fingerprint
        assert proof.radius == float(radius[i])
        y = system.evaluate(x[[i]].double())[-1][0]
        assert 0 < proof.margin <= (y[labels[i]] - y).masked_fill(y == y[labels[i]], 9e9).min()
        assert Certificate.from_json(proof.to_json()) == proof
    assert len({proof.point for proof in proofs}) == 6
    assert certify_balls(system, x, wrong, radius, norm="l2", box=None, seconds=0.1) == [None] * 6


def test_images_of_any_shape_are_flattened():
    system = system_of("chain")
    x, labels = images(system)
    flat, shaped = (
        certify_balls(system, t, labels, 1e-3, norm="l2", box=None, seconds=0.0)
        for t in (x, x.view(6, 1, 2, 2))
    )
    assert flat == shaped


def test_a_fingerprint_knows_the_equations():
    weights = equilibrium()
    systems = [
        AffineSystem.of_weights(weights, RELU),
        AffineSystem.of_weights(weights, RELU, 0.5),
        AffineSystem.of_weights(weights.with_tensors({"b": weights.b + 1}), RELU),
        system_of("chain"), system_of("residual"), system_of("sparse"), system_of("tanh"),
    ]  # fmt: skip
    assert len({system.fingerprint for system in systems}) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 3])}, "labels must lie in"),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels must be 2 integers"),
        ({"radius": -0.1}, "at least 0"),
        ({"radius": math.nan}, "at least 0"),
        ({"x": torch.full((2, 4), 1.5)}, "must lie in the box"),
        ({"x": torch.full((2, 4), math.nan)}, "NaN"),
        ({"x": torch.rand(2, 5)}, "inputs of 4 numbers"),
        ({"norm": "l1"}, "l2 or linf"),
        ({"seconds": -1.0}, "seconds"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {
        "x": torch.rand(2, 4), "labels": torch.tensor([0, 1]), "radius": 0.1, "norm": "l2",
        "box": (0.0, 1.0), "seconds": 0.0, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        certify_balls(system_of("chain"), **arguments)


def test_an_equilibrium_that_may_not_exist_is_refused():
    weights = equilibrium()
    unstable = weights.with_tensors({"W": weights.W + 9 * torch.eye(6)})
    system = AffineSystem.of_weights(unstable, RELU)
    x = torch.rand(1, 3)
    with pytest.raises(CertificateError, match="monotone"):
        for label in (0, 1):
            certify_balls(system, x, torch.tensor([label]), 0.1, norm="l2", box=None, seconds=0.0)


def test_a_record_names_its_kind():
    assert issubclass(BallCertificate, Certificate)
