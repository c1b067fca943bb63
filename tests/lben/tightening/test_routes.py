"""Every route proves a bound; one that fails, or is too large, is followed by the next."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse

from lben import CertificateError
from lben.certificates.network_norms import prove_product
from lben.tightening import routes
from lben.tightening.routes import Route, estimate_cost, prove_by_route, prove_by_size
from lben.weights.activation import RELU
from lben.weights.network import AffineMap, Block, Network
from tests.lben.certificates.networks import NETWORKS, chain

NAMES = ("primal-dual", "recursion", "product")


def zeros(*widths):
    """A chain of these widths; only its size counts."""
    maps = [
        AffineMap.of({k: scipy.sparse.csr_array((m, n))}, np.zeros(m))
        for k, (n, m) in enumerate(pairwise(widths))
    ]
    return Network(
        input_shape=widths[:1],
        blocks=tuple(Block(affine=m, activation=RELU) for m in maps[:-1]), output=maps[-1],
    )  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_each_route_proves_a_bound_that_the_network_keeps(name):
    network = NETWORKS[name]
    numbers = np.random.default_rng(0)
    x = numbers.standard_normal((2, 50, *network.input_shape))
    change = np.linalg.norm(network.evaluate(x[0]) - network.evaluate(x[1]), axis=1)
    quotient = float((change / np.linalg.norm(x[0] - x[1], axis=1)).max())
    bounds = []
    for route in NAMES:
        certificate, found = prove_by_route(network, route)
        certificate.check_fingerprint(network.fingerprint)
        assert quotient <= certificate.bound == found.bound
        assert certificate.method.startswith(f"{found.name}: ")
        assert found.name == route
        assert (found.gap is not None) == (found.steps is not None) == (route == "primal-dual")
        bounds.append(certificate.bound)
    assert bounds[0] <= bounds[1] * (1 + 1e-6)
    assert prove_by_size(network).bound == bounds[0]


@pytest.mark.parametrize(
    ("widths", "first"),
    [
        ((784, 128, 10), "primal-dual"), ((64, *[64] * 200, 10), "recursion"),
        ((9, 2300, 2300, 9), "recursion"), ((9, 9000, 9000, 9), "product"),
    ],
)  # fmt: skip
def test_the_size_decides(widths, first):
    network = zeros(*widths)
    assert next(r for r in NAMES if estimate_cost(network, r).fits(600.0)) == first


def test_the_route_says_why_tighter_ones_were_not_taken():
    _, found = prove_by_route(chain(3), seconds=0.0)
    assert found.name == "product"
    assert [reason.split()[:4] for reason in found.passed_over] == [
        ["primal-dual", "would", "take", "about"], ["recursion", "would", "take", "about"]
    ]  # fmt: skip
    assert "; recursion would take about" in str(found)


def test_a_route_that_fails_is_followed_by_the_next(monkeypatch):
    def fail(network):
        raise CertificateError("no storage")

    monkeypatch.setitem(routes._PROPOSALS, "primal-dual", fail)
    certificate, found = prove_by_route(chain(3))
    assert found.name == "recursion"
    assert found.passed_over == ("primal-dual failed: no storage",)
    assert certificate.method.startswith("recursion: ")
    monkeypatch.setitem(routes._PROPOSALS, "product", fail)
    with pytest.raises(CertificateError, match="no storage"):
        prove_by_route(chain(3), "product")


def test_a_bound_without_units_is_their_norm():
    network = Network(
        input_shape=(2,), blocks=(), output=AffineMap.of({0: 2 * np.eye(2)}, np.zeros(2))
    )
    assert prove_by_route(network)[0].bound == pytest.approx(2.0)
    assert prove_product(network).bound == pytest.approx(2.0)


def test_unknown_routes_and_negative_times_are_refused():
    with pytest.raises(ValueError, match="route must be one of primal-dual, recursion, product"):
        prove_by_route(chain(1), "fast")
    with pytest.raises(ValueError, match="seconds must be at least 0, got -1"):
        prove_by_route(chain(1), seconds=-1.0)


def test_a_route_is_one_line():
    route = Route(name="product", bound=1.0, seconds=0.1, gap=0.0, steps=9, passed_over=("a", "b"))
    assert str(route) == (
        "bound 1 by product, at most 0 above the least (estimated), in 0.1 seconds (9 Newton "
        "steps); a; b"
    )
