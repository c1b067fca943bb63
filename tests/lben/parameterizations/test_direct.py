import pytest
import torch

from lben import CertificateError, certify
from lben.parameterizations import DirectParameterization

FAMILIES = [
    {"gamma": 1.0},
    {"gamma": 0.05},
    {"gamma": 30.0, "feedthrough": True},
    {"gamma": 1.0, "feedthrough": True, "learn_metric": False},
    {"gamma": None},
    {"gamma": None, "learn_metric": False},
]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=repr)


def scrambled(family, scale=1.0, sizes=(7, 6, 3)):
    parameterization = DirectParameterization(*sizes, dtype=torch.float64, **family)
    with torch.no_grad():
        for parameter in parameterization.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return parameterization


@each_family
@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0])
def test_certificate_holds_for_every_value_of_the_free_tensors(family, scale):
    certificate = certify(scrambled(family, scale)())
    assert certificate.bound == (family["gamma"] or float("inf"))
    assert certificate.m >= 0.99e-3


@each_family
def test_right_inverse_returns_to_the_weights(family):
    weights = scrambled(family)()
    other = DirectParameterization(7, 6, 3, dtype=torch.float64, **family)
    other.right_inverse(weights)
    for name, value in other().tensors().items():
        torch.testing.assert_close(value, weights.tensors()[name], rtol=1e-8, atol=1e-8)


def test_families_differ_where_they_should():
    bounded, free, monotone = (scrambled(f)() for f in (FAMILIES[0], FAMILIES[4], FAMILIES[5]))
    assert bounded.gamma == 1.0
    assert free.gamma is None
    assert not torch.equal(free.Lambda, torch.ones(6, dtype=torch.float64))
    assert torch.equal(monotone.Lambda, torch.ones(6, dtype=torch.float64))


def test_feedthrough_approaches_but_never_reaches_gamma():
    parameterization = scrambled({"gamma": 2.0, "feedthrough": True})
    with torch.no_grad():
        parameterization.X.mul_(100)
    norm = float(torch.linalg.matrix_norm(parameterization().D.detach(), 2))
    assert 1.99 < norm < 2.0


@pytest.mark.parametrize("term", ["CᵀC", "UUᵀ", "VᵀV"])
def test_a_flipped_sign_is_caught_by_the_certificate(term, monkeypatch):
    parameterization = scrambled({"gamma": 0.5})
    healthy = parameterization()
    Lambda = healthy.Lambda
    C, G, V = parameterization.C, Lambda[:, None] * parameterization.U, parameterization.V
    flipped = {"CᵀC": C.T @ C / 0.5, "UUᵀ": G @ G.T / 0.5, "VᵀV": 2 * V.T @ V}[term]
    broken = healthy.apply(torch.Tensor.detach)
    object.__setattr__(broken, "W", (healthy.W + flipped / Lambda[:, None]).detach())
    certify(healthy)
    with pytest.raises(CertificateError, match=r"the Lipschitz bound γ = 0\.5 could not be proved"):
        certify(broken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, "gamma must be a positive"),
        ({"gamma": -1.0}, "gamma must be a positive"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"gamma": None, "feedthrough": True}, "feedthrough needs gamma"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DirectParameterization(3, 3, 3, **options)


def test_bad_sizes():
    with pytest.raises(ValueError, match="hidden_features must be at least 1, got 0"):
        DirectParameterization(3, 0, 3)


def test_right_inverse_refuses_what_it_cannot_represent():
    target = DirectParameterization(7, 6, 3, dtype=torch.float64, gamma=1.0)
    with pytest.raises(ValueError, match=r"gamma is 1\.0 here and 2\.0"):
        target.right_inverse(scrambled({"gamma": 2.0})())
    with pytest.raises(ValueError, match="feed-through D"):
        target.right_inverse(scrambled({"gamma": 1.0, "feedthrough": True})())
    fixed = DirectParameterization(7, 6, 3, dtype=torch.float64, gamma=1.0, learn_metric=False)
    with pytest.raises(ValueError, match="fixed Λ = I"):
        fixed.right_inverse(scrambled({"gamma": 1.0})())
    infeasible = scrambled({"gamma": 1.0})().apply(torch.Tensor.detach)
    infeasible.W.mul_(0).fill_diagonal_(0.99)
    with pytest.raises(ValueError, match="do not satisfy the certificate"):
        target.right_inverse(infeasible)
