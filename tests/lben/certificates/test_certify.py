"""Proofs agree with exact arithmetic; false claims and things without a proof are refused."""

import dataclasses
import math

import flint
import pytest
import torch

from lben import (
    CertificateError,
    ChainCertificate,
    Claim,
    DenseWeights,
    EquilibriumConv2d,
    EquilibriumLinear,
    FeedforwardClassifierConfig,
    Flatten,
    IntervalClaim,
    LayerCertificate,
    LipschitzSequential,
    Normalize,
    NormalizedLinear,
    PooledEquilibriumConv2d,
    SLLConv2d,
    SLLLinear,
    certify,
    tighten_scaled,
)
from lben.certificates.network import prove_network
from lben.tightening.network import tighten_network
from solvers import DenseOperator, Inclusion, ReLU, solve
from tests.lben.certificates.networks import chain
from tests.lben.certificates.weights import random_weights
from tests.lben.weights.kinds import KINDS, matrices


def exact_schur(weights: DenseWeights, gamma: float, Lambda: torch.Tensor) -> flint.fmpq_mat:
    """γ(2Λ − ΛW − WᵀΛ) − CᵀC − ΛUUᵀΛ in exact rational arithmetic."""

    def rational(t):
        t = t.double()
        values = [flint.fmpq(*float(x).as_integer_ratio()) for x in t.ravel()]
        return flint.fmpq_mat(*t.shape, values)

    L, W = rational(torch.diag(Lambda)), rational(weights.W)
    U, C = rational(weights.U), rational(weights.C)
    G, g = L * U, flint.fmpq(*gamma.as_integer_ratio())
    LW = L * W
    return (L * 2 - LW - LW.transpose()) * g - C.transpose() * C - G * G.transpose()


def positive_definite(a: flint.fmpq_mat) -> bool:
    n = a.nrows()
    return all(
        flint.fmpq_mat(k, k, [a[i, j] for i in range(k) for j in range(k)]).det() > 0
        for k in range(1, n + 1)
    )


def forward(weights: DenseWeights, x: torch.Tensor) -> torch.Tensor:
    operator = DenseOperator(weights.W, weights.Lambda)
    v = x @ weights.U.T + weights.b
    z = solve(Inclusion(operator, v, ReLU()), tol=1e-12, max_steps=5000, on_failure="raise").value
    y = z @ weights.C.T + weights.b_y
    return y if weights.D is None else y + x @ weights.D.T


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_proof_agrees_with_exact_rational_arithmetic(seed, dtype):
    weights = random_weights(seed=seed, dtype=dtype)
    certify(weights)
    assert positive_definite(exact_schur(weights, 1.0, weights.Lambda))


@pytest.mark.parametrize("seed", range(4))
def test_a_claim_below_the_least_gamma_is_refused(seed):
    # The least γ that Λ supports, bracketed by exact arithmetic to 1e-12; 1e-9 below is refused.
    weights = random_weights(seed=seed)
    low, high = 1e-3, 1.0
    while high / low > 1 + 1e-12:
        middle = math.sqrt(low * high)
        if positive_definite(exact_schur(weights, middle, weights.Lambda)):
            high = middle
        else:
            low = middle
    assert certify(weights, Claim(high * (1 + 1e-9), weights.Lambda)).bound == high * (1 + 1e-9)
    for false in (low * (1 - 1e-9), low * (1 - 1e-12), 0.5 * low):
        with pytest.raises(CertificateError, match="could not be proved"):
            certify(weights, Claim(false, weights.Lambda))


@pytest.mark.parametrize("seed", range(4))
def test_tightened_claims_are_proved_and_no_worse(seed):
    weights = random_weights(seed=seed)
    claim = tighten_scaled(weights)
    assert claim.gamma < weights.gamma
    assert certify(weights, claim).bound == claim.gamma
    assert positive_definite(exact_schur(weights, claim.gamma, claim.Lambda))
    x, y = torch.randn(2, 2000, 7, dtype=torch.float64)
    y = x + 0.1 * y
    quotient = (forward(weights, x) - forward(weights, y)).norm(dim=1) / (x - y).norm(dim=1)
    assert quotient.max() <= claim.gamma
    assert quotient.max() > 0.3 * claim.gamma


def test_tightening_a_layer_that_claims_no_bound():
    weights = random_weights(gamma=None, epsilon=0.5)
    assert certify(weights).bound == math.inf
    assert 0 < certify(weights, tighten_scaled(weights)).bound < math.inf


def test_tighten_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="without feed-through"):
        tighten_scaled(random_weights(feedthrough=True))
    weights = random_weights()
    broken = dataclasses.replace(weights, W=3 * torch.eye(6, dtype=torch.float64))
    with pytest.raises(CertificateError, match="not positive definite"):
        tighten_scaled(broken)


@pytest.mark.parametrize("options", [{}, {"feedthrough": True}, {"gamma": None}], ids=repr)
def test_constants_of_a_certificate_are_proved_bounds(options):
    weights = random_weights(**options)
    certificate = certify(weights)
    root = weights.Lambda.sqrt()
    H = root[:, None] * (torch.eye(6, dtype=torch.float64) - weights.W) / root
    assert certificate.m <= float(torch.linalg.eigvalsh((H + H.T) / 2)[0])
    assert float(torch.linalg.matrix_norm(H, 2)) <= certificate.L
    assert certificate.output_gain >= float(torch.linalg.matrix_norm(weights.C / root, 2))
    assert certificate.m == pytest.approx(float(torch.linalg.eigvalsh((H + H.T) / 2)[0]))


def sll(n=5, p=4, seed=0, scale=1.0):
    """SLL with all q = 1, as an equilibrium layer with W = 0 and D = I."""
    g = torch.Generator().manual_seed(seed)
    K = scale * torch.randn(p, n, generator=g, dtype=torch.float64)
    T = (K.T @ K).abs().sum(1)
    return explicit(K, T)


def cpl(n=5, p=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    K = torch.randn(p, n, generator=g, dtype=torch.float64)
    T = torch.full((n,), float(torch.linalg.matrix_norm(K, 2)) ** 2, dtype=torch.float64)
    return explicit(K, T)


def explicit(K, T):
    p, n = K.shape
    zeros = torch.zeros(n, dtype=torch.float64)
    return DenseWeights(
        W=torch.zeros(n, n, dtype=torch.float64),
        U=K.T,
        b=zeros,
        C=-2 * K / T,
        D=torch.eye(p, dtype=torch.float64),
        b_y=torch.zeros(p, dtype=torch.float64),
        Lambda=2 / T,
        gamma=1.0,
    )


@pytest.mark.parametrize("make", [sll, cpl])
def test_residual_layers_are_instances_of_the_same_certificate(make):
    # At γ = 1 the corner γI − DᵀD/γ and the side block vanish, so M ⪰ 0 is singular. Just above,
    # the Schur complement is 2Λ − (2/(γ + 1)) ΛKᵀKΛ, strictly positive when T ⪰ KᵀK.
    weights = make()
    M = assemble(weights, 1.0)
    assert torch.linalg.eigvalsh(M)[0] > -1e-12
    for gamma in (1.0 + 1e-3, 1.5):
        assert certify(weights, Claim(gamma, weights.Lambda)).bound == gamma
    with pytest.raises(CertificateError):
        certify(weights, Claim(1 - 1e-6, weights.Lambda))


def assemble(w, gamma):
    """M(Λ, γ) as it stands in the definition."""
    L = torch.diag(w.Lambda)
    corner = gamma * torch.eye(w.in_features, dtype=torch.float64) - w.D.T @ w.D / gamma
    side = -(w.U.T @ L + w.D.T @ w.C / gamma)
    rest = 2 * L - L @ w.W - w.W.T @ L - w.C.T @ w.C / gamma
    return torch.cat([torch.cat([corner, side], 1), torch.cat([side.T, rest], 1)])


def test_smallest_eigenvalue_is_that_of_the_whole_matrix():
    for sizes in ((7, 6, 3), (40, 6, 3), (3, 6, 5)):
        weights = random_weights(sizes=sizes, feedthrough=True)
        expected = float(torch.linalg.eigvalsh(assemble(weights, 1.0))[0])
        assert certify(weights).smallest_eigenvalue == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["W", "U", "C", "Lambda"])
def test_non_finite_weights_are_refused(name, bad):
    weights = random_weights()
    weights.tensors()[name].view(-1)[0] = bad
    with pytest.raises(CertificateError, match="NaN or Inf"):
        certify(weights)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_multipliers_must_be_positive(bad):
    weights = random_weights()
    Lambda = weights.Lambda.clone()
    Lambda[2] = bad
    with pytest.raises(CertificateError, match="Λ must be positive"):
        certify(weights, Claim(1.0, Lambda))


def test_bad_claims_are_refused():
    weights = random_weights()
    with pytest.raises(ValueError, match="gamma must be a positive"):
        certify(weights, Claim(-1.0, weights.Lambda))
    with pytest.raises(ValueError, match=r"Lambda must have shape \(6,\)"):
        certify(weights, Claim(1.0, weights.Lambda[:5]))


@pytest.mark.parametrize("tol", [1e-2, 1e-6, 1e-12])
def test_logit_error_covers_an_inexact_solve_and_is_not_idle(tol):
    weights = random_weights(feedthrough=True)
    layer = EquilibriumLinear(7, 6, 3, gamma=weights.gamma, feedthrough=True, tol=tol).double()
    layer.parameterization.forward = lambda: weights
    x = torch.randn(200, 7, dtype=torch.float64)
    found = layer.forward_with_error(x, certify(weights))
    y, bound = found.value, found.error
    true_error = (y - forward(weights, x)).norm(dim=1)
    assert (true_error <= bound + 1e-11).all()
    assert (bound <= 1000 * true_error.max() + 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_every_kind_are_proved_by_one_verb(kind):
    w = KINDS[kind]()
    proof = certify(w)
    assert isinstance(proof, LayerCertificate)
    assert proof.bound == (math.inf if w.gamma is None else w.gamma)
    assert proof.margin > 0
    proof.check(w)
    with pytest.raises(CertificateError, match="other weights"):
        proof.check(w.with_tensors({"b_y": w.b_y + 1}))
    assert certify(matrices(w)).bound == proof.bound
    whole = certify(w, Claim(None, w.multiplier)) if kind[:6] != "pooled" else None
    assert whole is None or whole.bound == math.inf
    size = w.proved_size()
    if size is not None:
        assert certify(w, image=size[0]) == proof
        assert proof.image == size[0]


def test_a_claim_about_all_outputs_is_one_about_weights_of_images_too():
    for kind in ("no D", "number D", "reads the state", "stride"):
        w = KINDS[kind]()
        assert certify(w, Claim(1.5 * w.gamma, w.Lambda)).bound == 1.5 * w.gamma
        with pytest.raises(CertificateError, match="could not be proved"):
            certify(w, Claim(1e-3 * w.gamma, w.Lambda))


def test_modules_prove_themselves():
    layers = {
        "explicit": (SLLConv2d(2, 3), (4, 5)), "dense": (SLLLinear(6, 3), (6,)),
        "head": (NormalizedLinear(6, 3), (6,)), "map": (Flatten(), None),
        "normalisation": (Normalize((0.5,), (0.5,)), None),
        "equilibrium": (EquilibriumLinear(6, 5, 3), None),
        "images": (EquilibriumConv2d(2, 3, 2, image=(4, 5)), (4, 5)),
        "pooled": (PooledEquilibriumConv2d(2, 3, 2, image=(4, 4), pool=2), None),
        "chain": (LipschitzSequential(SLLConv2d(2, 3), Flatten()), (2, 4, 5)),
    }  # fmt: skip
    for name, (layer, image) in layers.items():
        found = certify(layer) if image is None else certify(layer, image=image)
        expected = layer.certificate() if image is None else layer.certificate(image)
        assert found == expected, name
    assert isinstance(certify(layers["chain"][0], image=(2, 4, 5)), ChainCertificate)
    model = FeedforwardClassifierConfig(
        shape=(1, 4, 4), classes=3, mean=(0.5,), std=(0.5,), channels=(2,), depths=(1,),
        conv_hidden=2, pool=2, dense_depth=1, dense_hidden=3,
    ).build()  # fmt: skip
    assert certify(model) == certify(model, image=(1, 4, 4)) == model.certificate()
    assert certify(model).network == model.fingerprint


def test_what_has_no_proof_is_named_with_the_next_step():
    for wrong in (torch.nn.Linear(2, 2), 1.0, torch.zeros(2, 2), None):
        kind = type(wrong).__name__
        with pytest.raises(TypeError, match=rf"got {kind}: give it a method certificate\("):
            certify(wrong)
    layer = EquilibriumLinear(3, 4, 2)
    with pytest.raises(TypeError, match=r"certify\(layer\.weights\(\), claim\)"):
        certify(layer, Claim(1.0, layer.weights().Lambda))
    with pytest.raises(TypeError, match="no such claim: float"):
        certify(layer.weights(), 2.0)
    for claims in ({(0, 1): Claim(1.0, torch.ones(3))}, IntervalClaim()):
        with pytest.raises(ValueError, match=r"pairs of outputs are proved for DenseWeights"):
            certify(KINDS["no D"](), claims)


def test_image_sizes_are_pairs_and_fit():
    w, pooled = KINDS["no D"](), KINDS["pooled"]()
    for wrong in ((4,), (2, 4, 5), "44", 4, (4.5, 4)):
        with pytest.raises(TypeError, match=r"pair \(height, width\)|must be an integer"):
            certify(w, image=wrong)
    with pytest.raises(ValueError, match="at least 1"):
        certify(w, image=(0, 4))
    assert certify(w, image=(9, 9)).image == (9, 9)
    with pytest.raises(ValueError, match=r"weights are for images of \(6, 8\), got \(9, 9\)"):
        certify(pooled, image=(9, 9))


class Foreign(DenseWeights):
    """Weights of another class than those with a proof, which a subclass inherits."""


def test_proofs_are_chosen_by_what_weights_are():
    w = KINDS["dense"]()
    again = Foreign(**w.tensors(), gamma=w.gamma)
    assert certify(again).bound == w.gamma


def test_networks_are_certified_with_a_claim_and_without():
    network = chain(2)
    alone = certify(network)
    assert alone == prove_network(network)
    claim = tighten_network(network)
    assert certify(network, claim).bound <= alone.bound * (1 + 1e-6)
    with pytest.raises(TypeError, match=r"proved with a NetworkClaim, or .* got IntervalClaim"):
        certify(network, IntervalClaim())
    with pytest.raises(ValueError, match=r"built for inputs of \(3,\): omit image"):
        certify(network, image=(3, 3))
