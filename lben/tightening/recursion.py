"""Which multipliers does a network have for certain? One backward pass proposes them.

Symbols: lben/certificates/network.py. Let N be the storage after a block, restricted to the states
of that block. Any Λ with 2Λ ≻ N makes the next storage finite. So a proposal always exists: from
the outputs to the inputs, Λ_k = ‖N‖₂I for the storage of the earlier choices. With it the next
storage is at most ‖N‖₂ W_kᵀW_k, and the bound at most the product of the layers' norms.

Note [Steps]
For increments e of the pre-activations, the least next storage is eᵀΛ(2Λ − N)⁻¹Λe: the maximum over
r of rᵀNr − 2rᵀΛ(r − e), taken at r = (2Λ − N)⁻¹Λe. For e of covariance S its mean is

    f(Λ) = tr(SΛ(2Λ − N)⁻¹Λ),   ∂f/∂λᵢ = 2(E[rᵢeᵢ] − E[rᵢ²]).

So λᵢ grows where E[rᵢ²] is larger than E[rᵢeᵢ], and falls where it is smaller, as long as f falls.
S is that of inputs with covariance I, passed forward through the weights; each block adds a share
of the identity, because the direction in which a deep network gains most is not that of its
weights alone. Two steps are taken. More of them serve f, and no longer the bound: f is not γ. The
proposal without steps is compared with the one with steps.

Reference:
    Xu and Sivaranjani (2024), "ECLipsE: efficient compositional Lipschitz constant estimation for
    deep neural networks", for the recursion over layers, from the input; this one runs from the
    output.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from lben.certificates.network import (
    Exponents,
    NetworkClaim,
    Step,
    Storage,
    choose_output_unit,
    get_input_unit,
    is_linear,
    renew_units,
    take_step,
)
from lben.rigorous import TINY, Array, Enclosure
from lben.weights.grouping import frontiers
from lben.weights.network import Network, to_dense

_STEPS = (0, 2)
"""How many steps the proposals take that are compared; see Note [Steps]."""
_DISTANCE = 0.02
"""Steps keep (2 − this)Λ ≻ N, so that rounding does not matter."""
_SLACK = 2.0**-35
"""What storages are enlarged by for each state, relative to Λ or to the unit: more than by the
proof. The least storages of a deep network may be very sensitive to it; so multipliers are chosen
for the larger ones."""
_SHARE = 0.2
"""Of the identity in the covariance after a block, relative to its largest eigenvalue."""


def propose_network_claim(network: Network, rows: Array | None = None) -> NetworkClaim:
    """Propose multipliers for a network by one pass over its blocks, in O(depth · width³).

    Args:
        network: with finite numbers.
        rows: F, m × q: for the bound of x ↦ Fy. All outputs when omitted.

    Returns:
        A claim without γ: the proof finds the least bound of the multipliers.

    Raises:
        CertificateError: if numbers are not finite, or leave the range of float64 on the way.

    Example:
        >>> import numpy as np
        >>> from lben.certificates.network import prove_network
        >>> from lben.tightening.recursion import propose_network_claim
        >>> from lben.weights.activation import RELU
        >>> from lben.weights.network import AffineMap, Block, Network
        >>> maps = [AffineMap.of({k: np.array([[2.0]])}, np.zeros(1)) for k in range(64)]
        >>> network = Network(
        ...     input_shape=(1,), blocks=tuple(Block(affine=m, activation=RELU) for m in maps),
        ...     output=AffineMap.of({64: np.array([[1.0]])}, np.zeros(1)),
        ... )  # 64 layers σ(2x)
        >>> bound = prove_network(network, propose_network_claim(network)).bound
        >>> round(bound / 2.0**64, 6)
        1.0
    """
    with np.errstate(all="ignore"):  # proposals: the proof finds what is not finite
        covariances = _spread(network)
        found = [_sweep(network, rows, covariances, steps) for steps in _STEPS]
    return min(found, key=lambda pair: pair[0])[1]


def _sweep(
    network: Network, rows: Array | None, covariances: list[Array], steps: int
) -> tuple[float, NetworkClaim]:
    """Return log₂ of the computed bound, and the claim."""
    unit = choose_output_unit(network, rows)
    storage, gain = Storage.of_output(network, rows, unit, {}), -math.inf
    free = [is_linear(network, k) for k in range(1, len(network.blocks) + 1)]
    logarithms = [
        np.zeros(0 if empty else width)
        for empty, width in zip(free, network.widths[1:], strict=True)
    ]
    for k in range(len(free), 0, -1):
        if k not in storage.blocks:
            continue  # no output depends on the block
        units, Lambda = storage.units[k], None
        if not free[k - 1]:
            S = _to_units(covariances[k - 1], units)
            Lambda = improve_multiplier(storage.dominate(k), storage.restrict(k), S, steps)
            logarithms[k - 1] = np.log(Lambda) + 2 * math.log(2.0) * (unit - units)
        size = np.ones(len(units)) if Lambda is None else Lambda
        storage = _enlarge(storage, k, _SLACK * len(storage.form.mid) * size)
        step = take_step(network, k, storage, Lambda, {})
        if step.blocks in ((), (0,)):
            gain = math.log2(max(step.compute_gain(), TINY)) + unit - get_input_unit(step)
            break
        assert isinstance(step, Step)
        step, least = renew_units(step, step.propose_least())
        storage = Storage(blocks=step.blocks, units=step.units, form=Enclosure(least))
    return gain, NetworkClaim.from_logarithms(None, logarithms)


def improve_multiplier(Lambda: Array, N: Array, S: Array, steps: int) -> Array:
    """Return a diagonal Λ with 2Λ ≻ N and a smaller mean of the next storage; see Note [Steps].

    Args:
        Lambda: n positive numbers with Λ ⪰ N.
        N: n × n, the storage of the states.
        S: n × n, the covariance of the pre-activations.
        steps: how many.

    Returns:
        n positive numbers.

    Example:
        >>> import numpy as np
        >>> from lben.tightening.recursion import improve_multiplier
        >>> improve_multiplier(np.full(2, 4.0), np.diag([4.0, 1.0]), np.eye(2), 9).round(1)
        array([4., 1.])
    """
    value, R = _measure(Lambda, N, S)
    for _ in range(steps):
        RS = R @ S
        own, mixed = np.einsum("ij,ij->i", RS, R), np.diag(RS)
        ratio = np.where(own > 0, own / np.maximum(mixed, 1e-3 * own), 1.0).clip(0.25, 4.0)
        for power in (1.0, 0.5, 0.25, 0.125):
            proposal = Lambda * ratio**power
            smaller, response = _measure(proposal, N, S)
            if smaller < value:
                Lambda, value, R = proposal, smaller, response
                break
    return Lambda


def _enlarge(storage: Storage, k: int, amounts: Array) -> Storage:
    """Return a storage with larger squares of the states of one block."""
    before = sum(len(storage.units[j]) for j in storage.blocks if j < k)
    diagonal = np.zeros(len(storage.form.mid))
    diagonal[before : before + len(amounts)] = amounts
    return replace(storage, form=storage.form + Enclosure(np.diag(diagonal)))


def _measure(Lambda: Array, N: Array, S: Array) -> tuple[float, Array]:
    """Return f(Λ), inf where it is not defined or nearly so, and (2Λ − N)⁻¹Λ."""
    try:
        np.linalg.cholesky((2 - _DISTANCE) * np.diag(Lambda) - N)
        R = np.asarray(np.linalg.solve(2 * np.diag(Lambda) - N, np.diag(Lambda)), dtype=np.float64)
    except np.linalg.LinAlgError:
        return math.inf, np.zeros_like(N)
    return float(np.sum(S * (Lambda[:, None] * R))), R


def _spread(network: Network) -> list[Array]:
    """Return a covariance of each block's pre-activations, with largest eigenvalue 1."""
    known = frontiers(network)
    found, blocks, S = [], known[0], np.eye(network.widths[0] if known[0] else 0)
    for k, own in enumerate(network.blocks, 1):
        if k not in known[k]:
            found.append(np.zeros((0, 0)))  # no output depends on the block
            continue
        W = np.hstack(
            [np.zeros((own.affine.units, 0))]
            + [
                to_dense(own.affine.matrices[j])
                if j in own.affine.matrices
                else np.zeros((own.affine.units, network.widths[j]))
                for j in blocks
            ]
        )
        WS = W @ S
        C = WS @ W.T
        size = float(np.linalg.norm(C, 2)) if np.isfinite(C).all() else 0.0
        C, WS, S = (C / size, WS / size, S / size) if size >= TINY else (C * 0, WS * 0, S)
        C = np.where(np.isfinite(C), C, 0.0) + 1e-6 * np.eye(len(C))
        found.append(C)
        joint = np.block([[S, WS.T], [WS, C + _SHARE * np.eye(len(C))]])
        states = (*blocks, k)
        read = np.repeat([j in known[k] for j in states], [network.widths[j] for j in states])
        blocks, S = known[k], joint[np.ix_(read, read)]
    return found


def _to_units(S: Array, units: Exponents) -> Array:
    """Return a covariance in units of the states, up to a common factor."""
    powers = np.ldexp(1.0, (int(np.median(units)) - units).clip(-500, 500))
    return S * np.multiply.outer(powers, powers)
