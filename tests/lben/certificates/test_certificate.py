"""Certificates are tied to what they prove, compose upwards, and survive a file."""

import dataclasses
import json
import math
from fractions import Fraction

import pytest
import torch

from lben import (
    Certificate,
    CertificateError,
    ChainCertificate,
    EquilibriumClassifierConfig,
    EquilibriumConv2d,
    EquilibriumLinear,
    Flatten,
    IntervalClaim,
    LayerCertificate,
    LipschitzSequential,
    Normalize,
    NormalizedLinear,
    PairCertificate,
    SLLConv2d,
    SLLLinear,
    certify,
    compose,
    tighten_pairs,
)
from lben.certificates import Sensitivity
from tests.lben.certificates.weights import random_weights


def test_a_certificate_is_tied_to_its_weights():
    weights = random_weights()
    certificate = certify(weights)
    certificate.check(weights)
    moved = dataclasses.replace(weights, W=weights.W + 1e-16 * weights.W.abs())
    moved.W[0, 0] = torch.nextafter(moved.W[0, 0], torch.tensor(9.0, dtype=torch.float64))
    with pytest.raises(CertificateError, match="for other weights"):
        certificate.check(moved)


def test_certificates_are_json():
    record = json.loads(compose([certify(random_weights(gamma=None))]).to_json())
    assert record["bound"] is None
    assert record["layers"][0]["m"] > 0


def test_composition_multiplies_upwards():
    certificate = certify(random_weights(gamma=0.1))
    normalisation = Normalize((0.5,), (1 / 3.0,)).certificate()
    network = compose([normalisation, certificate, certificate])
    exact = Fraction(normalisation.bound) * Fraction(certificate.bound) ** 2
    assert exact <= Fraction(network.bound) <= exact * (1 + Fraction(1, 10**14))
    assert network.bound == pytest.approx(0.03, rel=1e-6)


def everything():
    """One certificate of every kind, chains within chains included."""
    layer = EquilibriumLinear(6, 5, 4, gamma=2.0)
    weights = layer.weights().apply(torch.Tensor.detach)
    inner = LipschitzSequential(Flatten(), SLLLinear(6, 9), LipschitzSequential(layer))
    chain = LipschitzSequential(inner, NormalizedLinear(4, 3))
    model = EquilibriumClassifierConfig(
        shape=(1, 3, 3), classes=3, mean=(0.5,), std=(0.5,), hidden=5
    ).build()
    convolution = EquilibriumConv2d(2, 3, 2, image=(5, 6), circular=True)
    return {
        "map": Flatten().certificate(),
        "layer": layer.certificate(),
        "weights": certify(weights),
        "images": convolution.certificate(),
        "unbounded": certify(EquilibriumLinear(3, 4, 2, gamma=None)),
        "pairs": certify(weights, tighten_pairs(weights)),
        "infinite pairs": certify(
            dataclasses.replace(weights, W=-9 * torch.ones(5, 5)), IntervalClaim()
        ),
        "head": NormalizedLinear(4, 3).pair_certificate(),
        "chain": chain.certificate((6,)),
        "classifier": model.certificate(bound="pairs"),
        "nothing": compose([]),
    }


def test_every_record_survives_a_file_as_what_it_was():
    for name, record in everything().items():
        text = record.to_json()
        again = Certificate.from_json(text)
        assert type(again) is type(record), name
        assert again == record, name
        assert again.to_json() == text
        assert type(record).from_json(text) == record
        assert json.loads(text)["kind"] == type(record).__name__
    inner = Certificate.from_json(everything()["chain"].to_json()).layers[0]
    assert isinstance(inner, ChainCertificate)
    assert isinstance(inner.layers[2], ChainCertificate)
    assert isinstance(inner.leaves()[2], LayerCertificate)
    assert isinstance(inner.leaves()[2].sensitivity, Sensitivity)


def test_a_record_is_not_revived_as_another():
    for name, record in everything().items():
        for cls in (LayerCertificate, PairCertificate, ChainCertificate):
            if cls is not type(record):
                with pytest.raises(ValueError, match=f"is no {cls.__name__}"):
                    cls.from_json(record.to_json())
        tampered = json.loads(record.to_json()) | {"kind": "Wish"}
        with pytest.raises(ValueError, match="Wish is no Certificate"):
            Certificate.from_json(json.dumps(tampered)), name


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("layer", {"bound": 0.0}, "bound must be positive"),
        ("layer", {"bound": -1.0}, "bound must be positive"),
        ("layer", {"bound": math.nan}, "bound must be positive"),
        ("layer", {"bound": "1"}, "is no"),
        ("layer", {"margin": None}, "margin must be a positive number"),
        ("layer", {"margin": math.inf}, "margin must be a positive number"),
        ("layer", {"m": None}, "m must be a number"),
        ("layer", {"m": True}, "is no"),
        ("layer", {"fingerprint": 7}, "is no"),
        ("layer", {"extra": 1}, "the fields"),
        ("layer", {"image": [4]}, "is no|zip|shorter|longer"),
        ("layer", {"sensitivity": {"drive_to_state": 1.0}}, "is no"),
        ("map", {"bound": 0.0}, "bound must be positive"),
        ("map", {"margin": math.nan}, "margin must be a positive number"),
        ("pairs", {"norm": "l1"}, "norm must be l2 or linf"),
        ("pairs", {"bounds": [[1.0, 2.0]]}, "bounds must be a square table"),
        ("pairs", {"bounds": [[1.0, -2.0], [1.0, 1.0]]}, "bounds must be positive"),
        ("chain", {"bound": -1.0}, "bound must be positive"),
        ("chain", {"layers": {}}, "is no"),
        ("chain", {"layers": [1]}, "is no"),
    ],
)
def test_tampered_values_are_refused(name, change, message):
    record = everything()[name]
    text = json.dumps(json.loads(record.to_json()) | change)
    with pytest.raises(ValueError, match=message):
        Certificate.from_json(text)


def test_tampered_values_of_a_module_within_are_refused():
    content = json.loads(everything()["chain"].to_json())
    content["layers"][0]["layers"][2]["layers"][0]["bound"] = 0.0
    with pytest.raises(ValueError, match="bound must be positive"):
        Certificate.from_json(json.dumps(content))
    content = json.loads(everything()["chain"].to_json())
    content["pairs"]["bounds"][0][1] = -1.0
    with pytest.raises(ValueError, match="bounds must be positive"):
        Certificate.from_json(json.dumps(content))
    for text in ("", "[]", "null", "{", "1"):
        with pytest.raises(ValueError):
            Certificate.from_json(text)


def test_chains_are_compared_module_by_module():
    proof = everything()["chain"]
    assert proof.differences(proof) == ""
    assert proof.shortfall(proof) == ""
    other = everything()["chain"]
    assert "module 1 has fingerprint" in other.differences(proof)
    assert "it has 1 modules, the model 4" in compose(proof.layers[1:]).differences(proof)
    more = dataclasses.replace(proof, bound=0.5 * proof.bound)
    assert "as the bound, and only" in proof.shortfall(more)
    assert "is of" not in proof.shortfall(more, slack=1.0)
    leaf = dataclasses.replace(proof.layers[1], bound=0.1)
    assert "of module 3" in proof.shortfall(
        dataclasses.replace(proof, layers=(proof.layers[0], leaf))
    )


def test_only_certificates_compose():
    proof = certify(SLLLinear(3, 2))
    for wrong in (1.0, None, SLLLinear(3, 2)):
        with pytest.raises(TypeError, match="compose takes certificates of modules, got"):
            compose([proof, wrong])
    assert compose([]).bound == 1.0
    both = compose([proof, compose([proof])])
    assert both.leaves() == [proof, proof]
    assert both.network is None
    with pytest.raises(CertificateError, match="for another network"):
        both.check_network("0" * 64)
    assert both.radius_bound() == both.bound


def test_images_that_a_proof_does_not_cover_are_refused():
    proof = certify(SLLConv2d(2, 2), image=(6, 8))
    proof.check_image((6, 8), exactly=True)
    proof.check_image((5, 8), exactly=False)
    for size, exactly in (((5, 8), True), ((7, 8), False), ((6, 9), False)):
        with pytest.raises(CertificateError, match=r"for images of \(6, 8\), got images of"):
            proof.check_image(size, exactly=exactly)
