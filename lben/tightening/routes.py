"""Which global bound can a network of this size be given? The tightest that time and memory allow.

Note [Routes]
From tight to cheap, for n units in groups of at most w (lben/weights/grouping.py):

- primal-dual: the least bound of all multipliers (LipSDP). A Newton step costs about n²w + n³/3
  products, the memory is about 15 matrices n × n. On two cores a step took 3 s for n = 4096 in 64
  groups, and 2 to 5 s for n = 1500 in one group. Networks need 10 to 36 steps.
- recursion: multipliers of one pass over the blocks. Proposal and proof cost a multiple of w³ for
  each block whose storage is w × w, and about 20 matrices of this size. On one busy core such a
  block took 4 s for w = 500, 37 s for w = 1000 and 149 s for w = 1500.
- product: the product of the norms of all maps, where w × w is too much. It needs no matrix but
  those of the network.

Each route ends in a proof that believes nothing of the proposal. A route that fails is followed by
the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lben.certificates.certificate import CertificateError, LipschitzCertificate
from lben.certificates.network import NetworkClaim, is_linear, prove_network
from lben.certificates.network_norms import prove_product
from lben.tightening.network import tighten_network
from lben.tightening.recursion import propose_network_claim
from lben.weights.grouping import frontiers, group_blocks
from lben.weights.network import Network

RouteName = Literal["primal-dual", "recursion", "product"]
"""See Note [Routes]."""

_STEPS = 30
"""Newton steps that are expected."""
_NEWTON, _FACTOR, _BLOCK = 7e-10, 1e-10, 4e-8
"""Seconds for each of n²w and n³/3 of a step, and w³ of a block; see Note [Routes]."""
_MATRICES = {"primal-dual": 15, "recursion": 20}
_MEMORY = 4 * 2**30
"""Bytes that the matrices of a route may take."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """How a global bound was found.

    Attributes:
        name: "primal-dual", "recursion" or "product", see Note [Routes].
        bound: the proved bound.
        seconds: that proposal and proof took, together with those of routes that failed.
        gap: how far the bound may be above the least of all multipliers, relative to it, as the
            proposal estimates it; None where nothing is known.
        steps: Newton steps of the proposal; None where there were none.
        passed_over: why each tighter route was not taken, one sentence each.

    Example:
        >>> print(Route(name="recursion", bound=5.25, seconds=2.0))
        bound 5.25 by recursion, in 2 seconds
    """

    name: RouteName
    bound: float
    seconds: float
    gap: float | None = None
    steps: int | None = None
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        gap = "" if self.gap is None else f", at most {self.gap:.1g} above the least (estimated)"
        steps = "" if self.steps is None else f" ({self.steps} Newton steps)"
        why = "".join(f"; {reason}" for reason in self.passed_over)
        took = f"in {self.seconds:.3g} seconds{steps}"
        return f"bound {self.bound:.6g} by {self.name}{gap}, {took}{why}"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a route is expected to need.

    Attributes:
        seconds: on a core or two.
        memory: bytes.

    Example:
        >>> Cost(seconds=90.0, memory=2e9).fits(600.0)
        True
    """

    seconds: float
    memory: float

    def fits(self, seconds: float) -> bool:
        """Say whether time and memory are enough."""
        return self.seconds <= seconds and self.memory <= _MEMORY


def estimate_cost(network: Network, name: RouteName) -> Cost:
    """Estimate what a route needs; see Note [Routes].

    Args:
        network: any.
        name: of the route.

    Returns:
        The estimate; nothing for the product.

    Example:
        >>> import numpy as np
        >>> from lben.tightening.routes import estimate_cost
        >>> from lben.weights.activation import RELU
        >>> from lben.weights.network import AffineMap, Block, Network
        >>> maps = [AffineMap.of({k: np.eye(64)}, np.zeros(64)) for k in range(65)]
        >>> network = Network(
        ...     input_shape=(64,), output=maps.pop(),
        ...     blocks=tuple(Block(affine=m, activation=RELU) for m in maps),
        ... )  # 64 layers of 64 units
        >>> [round(estimate_cost(network, name).seconds) for name in ("primal-dual", "recursion")]
        [91, 1]
    """
    widths, known = network.widths, frontiers(network)
    if name == "primal-dual":
        free = [0] + [0 if is_linear(network, k) else w for k, w in enumerate(widths) if k]
        n = sum(free)
        w = max(sum(free[k] for k in group) for group in group_blocks(network))
        step = _NEWTON * n**2 * w + _FACTOR * n**3 / 3
        return Cost(seconds=_STEPS * step, memory=8 * _MATRICES[name] * n**2)
    if name == "recursion":
        sizes = [
            max(widths[k] // 2, sum(widths[j] for j in known[k - 1] if j))
            for k in range(1, len(widths))
            if k in known[k]
        ]
        return Cost(
            seconds=sum(_BLOCK * size**3 for size in sizes),
            memory=8 * _MATRICES[name] * max(sizes, default=0) ** 2,
        )
    return Cost(seconds=0.0, memory=0.0)


def prove_by_route(
    network: Network, route: RouteName | None = None, *, seconds: float = 600.0
) -> tuple[LipschitzCertificate, Route]:
    """Prove a global bound of a network by the tightest route that time and memory allow.

    Args:
        network: a feed-forward network.
        route: the route to begin with; chosen by the size of the network when omitted.
        seconds: that a route may need, as estimated from the size. It is no limit on a route that
            has begun.

    Returns:
        The certificate, whose method names the route, and how it was found.

    Raises:
        ValueError: for an unknown route, or seconds that are negative.
        CertificateError: if the last route fails too: a number is not finite, or leaves the range.

    Example:
        >>> import torch
        >>> from lben import from_torch
        >>> from lben.tightening.routes import prove_by_route
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        ... ).eval()
        >>> certificate, route = prove_by_route(from_torch(model, (4,)))
        >>> route.name, route.gap < 1e-6, certificate.method[:11], certificate.bound == route.bound
        ('primal-dual', True, 'primal-dual', True)
    """
    names: tuple[RouteName, ...] = get_args(RouteName)
    if route is not None and route not in names:
        raise ValueError(f"route must be one of {', '.join(names)}, got {route!r}")
    if not seconds >= 0:
        raise ValueError(f"seconds must be at least 0, got {seconds}")
    start, reasons = time.perf_counter(), []
    left = names if route is None else names[names.index(route) :]
    for name in left:
        cost = estimate_cost(network, name)
        if name != route and not cost.fits(seconds):
            reasons.append(
                f"{name} would take about {cost.seconds:.2g} seconds and "
                f"{cost.memory / 2**30:.2g} GiB"
            )
            continue
        try:
            claim = _PROPOSALS[name](network)
            certificate = prove_product(network) if claim is None else prove_network(network, claim)
        except CertificateError as error:
            if name == "product":
                raise
            reasons.append(f"{name} failed: {error}")
            continue
        found = Route(
            name=name, bound=certificate.bound, seconds=time.perf_counter() - start,
            gap=None if claim is None else claim.gap, steps=None if claim is None else claim.steps,
            passed_over=tuple(reasons),
        )  # fmt: skip
        return replace(certificate, method=f"{name}: {certificate.method}"), found
    raise AssertionError("the product costs nothing")


def prove_by_size(network: Network) -> LipschitzCertificate:
    """Return the certificate of `prove_by_route`.

    Args:
        network: a feed-forward network.

    Raises:
        CertificateError: if no route proves a bound.

    Example:
        See `prove_by_route`.
    """
    return prove_by_route(network)[0]


_PROPOSALS: dict[RouteName, Callable[[Network], NetworkClaim | None]] = {
    "primal-dual": tighten_network,
    "recursion": propose_network_claim,
    "product": lambda network: None,
}
"""What is proved; the product needs no claim."""
