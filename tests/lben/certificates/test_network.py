"""Bounds of networks, proved block after block: exact arithmetic, attacks, planted faults."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import lben.certificates.network as module
from lben.certificates import (
    CertificateError,
    IntervalClaim,
    LipschitzCertificate,
    PairCertificate,
    certify,
)
from lben.certificates.network import NetworkClaim, prove_network
from lben.tightening import tighten_diagonal
from lben.tightening.recursion import propose_network_claim
from lben.weights.activation import IDENTITY, RELU
from lben.weights.network import AffineMap, Block, Network, to_dense

from .networks import BENT, NETWORKS, build, chain, is_positive, quadratic_form


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_proved_holds_in_exact_arithmetic(name):
    network = NETWORKS[name]
    claim = propose_network_claim(network)
    bound = prove_network(network, claim).bound
    assert is_positive(quadratic_form(network, replace(claim, gamma=bound)))
    smaller = replace(claim, gamma=bound * (1 - 1e-6))
    assert not is_positive(quadratic_form(network, smaller))  # so the bound is approached
    with pytest.raises(CertificateError):
        prove_network(network, smaller)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_quotient_exceeds_the_bound(name):
    network = NETWORKS[name]
    certificate = prove_network(network, propose_network_claim(network))
    numbers, best = np.random.default_rng(0), 0.0
    for size in (1e-4, 1.0, 100.0):
        x = numbers.standard_normal((2000, network.widths[0]))
        step = size * numbers.standard_normal(x.shape)
        change = network.evaluate(x + step) - network.evaluate(x)
        best = max(best, np.max(np.linalg.norm(change, axis=1) / np.linalg.norm(step, axis=1)))
    assert 0 < best <= certificate.bound * (1 + 1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_derivative_exceeds_the_bound(name):
    """The steepest step at a point, by the Jacobian there."""
    network, best = NETWORKS[name], 0.0
    bound = prove_network(network, propose_network_claim(network)).bound
    numbers = np.random.default_rng(1)
    for x in 10 * numbers.standard_normal((100, network.widths[0])):
        steps = x + 1e-3 * np.eye(len(x))
        jacobian = (network.evaluate(steps) - network.evaluate(x[None])).T / 1e-3
        direction = np.linalg.svd(jacobian)[2][0]
        ends = network.evaluate(np.stack([x, x + 1e-3 * direction]))
        best = max(best, float(np.linalg.norm(ends[1] - ends[0])) / 1e-3)
    assert 0.2 * bound < best <= bound * (1 + 1e-9)


@pytest.mark.parametrize("name", ["one block", "chain", "wide input", "residual"])
def test_what_the_whole_matrix_proves_is_proved_block_after_block(name):
    network = NETWORKS[name]
    start = propose_network_claim(network)
    bound = prove_network(network, start).bound
    scales = np.concatenate(list(map(np.ldexp, start.multipliers, start.exponents)))
    weights = replace(network.dense(), Lambda=torch.from_numpy(scales / bound))
    best = tighten_diagonal(weights)
    assert certify(weights, best).bound == best.gamma <= bound
    values = np.split(best.gamma * best.Lambda.numpy(), np.cumsum(network.widths[1:-1]))
    claim = NetworkClaim(gamma=best.gamma, multipliers=tuple(values))
    assert prove_network(network, claim).bound == best.gamma
    assert prove_network(network, replace(claim, gamma=None)).bound <= best.gamma
    with pytest.raises(CertificateError):  # below the optimum
        prove_network(network, replace(claim, gamma=best.gamma * (1 - 1e-4)))


@pytest.mark.parametrize("name", ["chain", "wide input", "residual", "inputs everywhere"])
def test_rows_of_outputs_have_bounds_of_their_own(name):
    network = NETWORKS[name]
    F = np.array([[1.0, -1.0, 0.0]])
    claim = propose_network_claim(network, F)
    certificate = prove_network(network, claim, F)
    assert is_positive(quadratic_form(network, replace(claim, gamma=certificate.bound), F))
    whole = prove_network(network, propose_network_claim(network))
    assert certificate.fingerprint != whole.fingerprint == network.fingerprint
    one = prove_network(network, propose_network_claim(network, F[:, [1, 2, 0]]), F[:, [1, 2, 0]])
    assert one.fingerprint != certificate.fingerprint


def test_a_given_bound_is_proved_as_it_is():
    network = NETWORKS["chain"]
    claim = propose_network_claim(network)
    least = prove_network(network, claim).bound
    for factor in (1 + 1e-12, 2.0, 1e6):
        assert prove_network(network, replace(claim, gamma=least * factor)).bound == least * factor


@pytest.mark.parametrize("exponent", [-510, -27, 40, 510])
def test_multipliers_scale_with_the_outputs(exponent):
    """y in other units: γ scales with them, λ with their square."""
    network = NETWORKS["chain"]
    claim = propose_network_claim(network)
    bound = prove_network(network, claim).bound
    output = network.output
    scaled = replace(
        network, output=AffineMap.of({4: np.ldexp(output.matrices[4], exponent)}, output.bias)
    )
    exponents = tuple(e + 2 * exponent for e in claim.exponents)
    found = prove_network(scaled, replace(claim, exponents=exponents))
    assert found.bound == np.ldexp(bound, exponent)


@pytest.mark.parametrize("flush", [False, True])
def test_denormal_weights_cost_tightness_and_not_truth(flush):
    network = chain(4, scales={2: 2.0**-1018})
    assert (np.abs(network.blocks[1].affine.matrices[1]) < 2.0**-1022).any()
    claim = propose_network_claim(network)
    torch.set_flush_denormal(flush)
    try:
        bound = prove_network(network, claim).bound
    finally:
        torch.set_flush_denormal(False)
    assert is_positive(quadratic_form(network, replace(claim, gamma=bound)))


@pytest.mark.parametrize("gain", [1e-3, 1.0, 1e3])
def test_deep_networks_of_any_gain(gain):
    network = chain(64, scales={k: gain**k for k in range(1, 65)}, inputs=4)
    claim = propose_network_claim(network)
    certificate = prove_network(network, claim)
    plain = chain(64, inputs=4)
    expected = prove_network(plain, propose_network_claim(plain)).bound
    # The last block is larger by gain⁶⁴, and the outputs take that back; so nothing else changed.
    assert certificate.bound == pytest.approx(expected, rel=1e-2)
    norms = [np.linalg.norm(b.affine.matrices[k], 2) for k, b in enumerate(plain.blocks)]
    assert (
        0 < certificate.bound < 1e-3 * np.prod([*norms, np.linalg.norm(plain.output.matrices[64])])
    )


def _one_rounded_unit():
    """Return σ(x) whose weight 1 is uncertain, and the largest weight that it may have."""
    affine = AffineMap(
        matrices={0: np.eye(1)}, bias=np.zeros(1), sizes={0: np.eye(1)}, bias_size=np.zeros(1),
        operations=2**44, exact=False,
    )  # fmt: skip
    output = AffineMap.of({1: np.eye(1)}, np.zeros(1))
    blocks = (Block(affine=affine, activation=RELU),)
    return Network(input_shape=(1,), blocks=blocks, output=output), 1 + affine.relative_radius


def test_numbers_that_are_not_exact_are_enclosed():
    network, largest = _one_rounded_unit()
    claim = NetworkClaim(gamma=None, multipliers=(np.ones(1),))
    assert prove_network(network, claim).bound >= largest > 1.003
    with pytest.raises(CertificateError):
        prove_network(network, replace(claim, gamma=largest * (1 - 1e-9)))


@pytest.mark.parametrize(
    "name",
    ["chain", "wide input", "wide input, slopes above 0", "wide input, slopes below 0", "residual",
     "concatenation", "inputs everywhere", "linear blocks", "linear first"],
)  # fmt: skip
def test_the_bound_holds_for_all_numbers_that_rounding_leaves_open(name):
    network = NETWORKS[name]
    numbers = np.random.default_rng(0)

    def blur(affine):
        return replace(affine, exact=False, operations=2**36)

    def move(affine):
        radius = blur(affine).relative_radius * (1 - 1e-3)  # inside of it after rounding
        assert radius > 1e-5
        matrices = {
            j: to_dense(W) + radius * numbers.choice([-1, 1], W.shape) * to_dense(affine.sizes[j])
            for j, W in affine.matrices.items()
        }
        return AffineMap.of(matrices, affine.bias)

    def change(rule):
        blocks = tuple(replace(block, affine=rule(block.affine)) for block in network.blocks)
        return replace(network, blocks=blocks, output=rule(network.output))

    claim = propose_network_claim(network)
    bound = prove_network(change(blur), claim).bound
    assert bound > prove_network(network, claim).bound * (1 + 1e-5)
    for _ in range(5):
        assert is_positive(quadratic_form(change(move), replace(claim, gamma=bound)))


def test_outputs_without_units():
    D = np.array([[3.0, 4.0]])
    affine = Network(input_shape=(2,), blocks=(), output=AffineMap.of({0: D}, np.zeros(1)))
    claim = NetworkClaim(gamma=None, multipliers=())
    certificate = prove_network(affine, claim)
    assert 5 <= certificate.bound <= 5 + 1e-12
    assert certificate.margin is None
    assert prove_network(affine, replace(claim, gamma=6.0)).bound == 6
    with pytest.raises(CertificateError, match="affine"):
        prove_network(affine, replace(claim, gamma=4.999999))


@pytest.mark.parametrize("name", NETWORKS)
def test_without_a_claim_there_is_a_bound_too(name):
    network = NETWORKS[name]
    bound = prove_network(network).bound
    assert prove_network(network, propose_network_claim(network)).bound <= bound * (1 + 1e-6)


def test_without_a_claim_the_bound_of_a_chain_is_below_the_product_of_norms():
    for depth in (1, 3, 64):
        network = chain(depth, units=6)
        norms = [np.linalg.norm(b.affine.matrices[k], 2) for k, b in enumerate(network.blocks)]
        norms.append(np.linalg.norm(network.output.matrices[depth], 2))
        assert prove_network(network).bound <= np.prod(norms) * (1 + 1e-9)


def test_a_constant_has_every_bound():
    nothing = AffineMap.of({}, np.ones(3))
    block, linear = (Block(affine=nothing, activation=sigma) for sigma in (RELU, IDENTITY))
    output = AffineMap.of({1: np.eye(3)}, np.zeros(3))
    for blocks, last in (
        ((block,), output), ((linear,), output), ((), nothing), ((block,), nothing)
    ):  # fmt: skip
        network = Network(input_shape=(2,), blocks=blocks, output=last)
        for claim in (None, propose_network_claim(network)):
            certificate = prove_network(network, claim)
            assert 0 < certificate.bound < 1e-200
            certificate.check_values()


def test_a_block_that_is_read_with_zeros_costs_nothing():
    network = build(
        [({0: 1}, RELU), ({1: 1}, IDENTITY), ({1: 1, 2: 1}, IDENTITY), ({1: 1, 3: 1}, RELU)],
        (4,), 3, scales={1: 2.0**40, 2: 2.0**-40},
    )  # fmt: skip
    affine = network.blocks[3].affine
    matrices = {1: affine.matrices[1], 3: np.zeros((4, 4))}
    last = replace(network.blocks[3], affine=AffineMap.of(matrices, affine.bias))
    without = replace(last, affine=AffineMap.of({1: matrices[1]}, affine.bias))
    bounds = [prove_network(replace(network, blocks=(*network.blocks[:3], block))).bound
              for block in (last, without)]  # fmt: skip
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-9)


def test_outputs_that_depend_on_nothing():
    zero = build([({0: 1}, RELU), ({1: 1}, RELU)], (2,), 3)
    zero = replace(zero, output=AffineMap.of({2: np.zeros((3, 4))}, np.zeros(3)))
    assert 0 < prove_network(zero, propose_network_claim(zero)).bound < 1e-50


def _forget_coupling(monkeypatch):
    embed = module._embed

    def forget(*arguments):
        first, side, own = embed(*arguments)
        return first, module.Enclosure(0 * side.mid), own

    monkeypatch.setattr(module, "_embed", forget)


def _forget_inputs(monkeypatch):
    read = module._read_output
    monkeypatch.setattr(
        module, "_read_output",
        lambda network, rows, j: module.Enclosure((j > 0) * read(network, rows, j).mid),
    )  # fmt: skip


def _round_upwards(monkeypatch):
    bound = module.smallest_eigenvalue_bound
    monkeypatch.setattr(module, "smallest_eigenvalue_bound", lambda matrix: bound(matrix) + 1e-6)


def _forget_signs(monkeypatch):
    number = module._number
    monkeypatch.setattr(module, "_number", lambda value: number(abs(value)))


FAULTS = {
    "a coupling between blocks is forgotten": ("residual", _forget_coupling, 1e-2),
    "inputs that outputs read are forgotten": ("inputs everywhere", _forget_inputs, 1e-2),
    "a slope has the wrong sign": ("slopes below 0", _forget_signs, 1e-2),
    "a slope has the wrong sign at a wide input": ("wide input, slopes below 0", _forget_signs,
                                                   1e-2),
    "eigenvalues are rounded upwards": ("chain", _round_upwards, 1e-8),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_exact_arithmetic_catches_a_planted_fault(fault, monkeypatch):
    name, plant, share = FAULTS[fault]
    network = NETWORKS[name]
    claim = propose_network_claim(network)
    wrong = replace(claim, gamma=prove_network(network, claim).bound * (1 - share))
    with pytest.raises(CertificateError):
        prove_network(network, wrong)
    plant(monkeypatch)
    assert prove_network(network, wrong).bound == wrong.gamma
    assert not is_positive(quadratic_form(network, wrong))


@pytest.mark.parametrize("name", ["chain", "residual", "linear blocks", "wide input"])
def test_badly_computed_storages_cost_tightness_and_not_truth(name, monkeypatch):
    network = NETWORKS[name]
    claim = propose_network_claim(network)
    solve = module._solve
    monkeypatch.setattr(module, "_solve", lambda *arguments: 1.01 * solve(*arguments))
    bound = prove_network(network, claim).bound
    assert is_positive(quadratic_form(network, replace(claim, gamma=bound)))


def test_a_forgotten_radius_is_caught(monkeypatch):
    network, largest = _one_rounded_unit()
    monkeypatch.setattr(AffineMap, "relative_radius", 0.0)
    claim = NetworkClaim(gamma=None, multipliers=(np.ones(1),))
    assert prove_network(network, claim).bound < largest


def test_claims_that_do_not_fit_are_refused():
    network = NETWORKS["chain"]
    claim = propose_network_claim(network)
    with pytest.raises(ValueError, match="4 blocks"):
        prove_network(network, replace(claim, multipliers=claim.multipliers[1:]))
    with pytest.raises(ValueError, match="multipliers of block 1 must have shape"):
        prove_network(network, replace(claim, multipliers=(np.ones(5), *claim.multipliers[1:])))
    with pytest.raises(ValueError, match="gamma must be"):
        prove_network(network, replace(claim, gamma=-1.0))
    with pytest.raises(ValueError, match="rows must be"):
        prove_network(network, claim, np.ones((1, 4)))
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(CertificateError, match="must be positive"):
            prove_network(
                network, replace(claim, multipliers=(np.full(4, bad), *claim.multipliers[1:]))
            )
    with pytest.raises(CertificateError, match="not positive definite"):
        prove_network(network, replace(claim, exponents=(*claim.exponents[:3], -60)))


def test_weights_that_are_not_finite_are_refused():
    network = chain(2)
    bad = network.blocks[0].affine.matrices[0].copy()
    bad[0, 0] = np.nan
    block = replace(network.blocks[0], affine=AffineMap.of({0: bad}, np.zeros(4)))
    broken = replace(network, blocks=(block, network.blocks[1]))
    for claim in (None, propose_network_claim(network)):
        with pytest.raises(CertificateError):
            prove_network(broken, claim)
    with pytest.raises(CertificateError):
        prove_network(broken, propose_network_claim(broken))


def test_a_certificate_is_a_record():
    certificate = prove_network(NETWORKS["chain"], propose_network_claim(NETWORKS["chain"]))
    assert LipschitzCertificate.from_json(certificate.to_json()) == certificate


def test_negative_slopes_cost_more():
    plain, bent = chain(3), chain(3, BENT)
    bounds = [prove_network(n, propose_network_claim(n)).bound for n in (plain, bent)]
    assert bounds[0] < bounds[1]


def test_certify_proves_networks_and_pairs_of_their_outputs():
    network = NETWORKS["residual"]
    claim = propose_network_claim(network)
    assert certify(network) == prove_network(network)
    whole = certify(network, claim)
    assert whole == prove_network(network, claim)
    rows = {(0, 1): [[1.0, -1, 0]], (0, 2): [[1.0, 0, -1]], (1, 2): [[0.0, 1, -1]]}
    claims = {pair: propose_network_claim(network, np.array(F)) for pair, F in rows.items()}
    pairs = certify(network, claims)
    for (i, j), F in rows.items():
        assert pairs[i][j] == pairs[j][i] == prove_network(network, claims[i, j], np.array(F)).bound
    assert pairs.fingerprint == network.fingerprint
    assert PairCertificate.from_json(pairs.to_json()) == pairs


def test_certify_refuses_what_no_network_claims():
    network = NETWORKS["chain"]
    with pytest.raises(ValueError, match="omit image"):
        certify(network, image=(8, 8))
    with pytest.raises(ValueError, match="outputs 0 and 1"):
        certify(network, {})
    with pytest.raises(TypeError, match="NetworkClaim"):
        certify(network, IntervalClaim())
