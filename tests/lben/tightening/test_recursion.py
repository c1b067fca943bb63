"""Multipliers of networks by one pass: they always exist, and they prove."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lben.certificates.network import prove_network
from lben.tightening import tighten_diagonal
from lben.tightening.recursion import improve_multiplier, propose_network_claim
from lben.weights.network import AffineMap
from tests.lben.certificates.networks import NETWORKS, chain


def product_of_norms(network) -> float:
    norms = [np.linalg.norm(b.affine.matrices[k], 2) for k, b in enumerate(network.blocks)]
    last = len(network.blocks)
    return float(np.prod(norms) * np.linalg.norm(network.output.matrices[last], 2))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("depth", [1, 2, 5, 30])
def test_the_bound_of_a_chain_is_below_the_product_of_norms(depth, seed):
    network = chain(depth, seed=seed, units=7)
    bound = prove_network(network, propose_network_claim(network)).bound
    assert bound <= product_of_norms(network) * (1 + 1e-9)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_bound_is_near_the_best_one(depth):
    network = chain(depth, units=6)
    claim = propose_network_claim(network)
    bound = prove_network(network, claim).bound
    start = np.concatenate(list(map(np.ldexp, claim.multipliers, claim.exponents))) / bound
    best = tighten_diagonal(replace(network.dense(), Lambda=torch.from_numpy(start))).gamma
    assert best * (1 - 1e-4) <= bound <= 1.3 * best


@pytest.mark.parametrize("name", NETWORKS)
def test_every_structure_has_a_proposal(name):
    claim = propose_network_claim(NETWORKS[name])
    assert all((values > 0).all() for values in claim.multipliers)
    assert 0 < prove_network(NETWORKS[name], claim).bound < np.inf


@pytest.mark.parametrize("exponent", [-400, 400])
def test_proposals_scale_with_the_outputs(exponent):
    network = NETWORKS["residual"]
    output = AffineMap.of(
        {j: np.ldexp(C, exponent) for j, C in network.output.matrices.items()}, network.output.bias
    )
    bounds = [prove_network(n, propose_network_claim(n)).bound
              for n in (network, replace(network, output=output))]  # fmt: skip
    assert bounds[1] == pytest.approx(np.ldexp(bounds[0], exponent), rel=1e-12)


@pytest.mark.parametrize("steps", [0, 1, 2, 10])
def test_multipliers_exceed_half_the_storage(steps):
    numbers = np.random.default_rng(0)
    for n in (1, 4, 9):
        root, other = numbers.standard_normal((2, n, n))
        N, S = root @ root.T, other @ other.T
        Lambda = improve_multiplier(np.full(n, np.linalg.norm(N, 2)), N, S, steps)
        assert np.linalg.eigvalsh(2 * np.diag(Lambda) - N)[0] > 0


def test_steps_lower_the_mean_storage():
    numbers = np.random.default_rng(1)
    root, other = numbers.standard_normal((2, 6, 6))
    N, S = root @ root.T, other @ other.T

    def mean(steps: int) -> float:
        L = np.diag(improve_multiplier(np.full(6, np.linalg.norm(N, 2)), N, S, steps))
        return float(np.trace(S @ L @ np.linalg.solve(2 * L - N, L)))

    assert mean(2) < mean(1) < mean(0)
