"""Which bound does the layer's own Λ support, up to a common factor?"""

from __future__ import annotations

import math

import numpy as np
import scipy.linalg
import scipy.optimize
import torch

from lben.certificates import CertificateError, Claim
from lben.convolutional import PooledWeights
from lben.weights import ExplicitWeights
from solvers.operators import Torus


def tighten(weights: ExplicitWeights) -> Claim:
    """Propose the least γ that the weights' own Λ, up to a common factor, supports.

    For D = 0 and S = 2Λ − ΛW − WᵀΛ the condition with Λ scaled by t is
    S ⪰ (CᵀC/t + tΛUUᵀΛ)/γ, so γ(t) = λmax(S⁻¹(CᵀC/t + tΛUUᵀΛ)), a convex function of log t
    minimised on a line. Works for layers that claim no bound (γ None) as well. The result is a
    proposal: `certify` proves it.

    Raises:
        ValueError: if the weights have a feed-through D.
        CertificateError: if S is not positive definite.
    """
    if weights.D is not None:
        raise ValueError("tighten needs weights without feed-through D")
    double = weights.to(torch.float64)
    W, C, Lambda = double.W.numpy(), double.C.numpy(), double.Lambda.numpy()
    G = Lambda[:, None] * double.U.numpy()
    weighted = Lambda[:, None] * W
    S = 2 * np.diag(Lambda) - weighted - weighted.T
    CC, GG = C.T @ C, G @ G.T
    last = [len(S) - 1, len(S) - 1]
    try:
        scipy.linalg.cholesky(S)
    except scipy.linalg.LinAlgError as error:
        raise CertificateError("2Λ − ΛW − WᵀΛ is not positive definite") from error

    def gamma(log_t: float) -> float:
        t = math.exp(log_t)
        top = scipy.linalg.eigh(CC / t + t * GG, S, eigvals_only=True, subset_by_index=last)
        return float(top[0])

    centre = 0.5 * math.log(np.trace(CC) / np.trace(GG))
    best = scipy.optimize.minimize_scalar(
        gamma, bounds=(centre - 5, centre + 5), method="bounded", options={"xatol": 1e-4}
    )
    t = math.exp(float(best.x))
    found = gamma(float(best.x)) * (1 + 1e-7)  # room for the proof
    if weights.gamma is not None and found >= weights.gamma:
        return Claim(weights.gamma, weights.Lambda)
    return Claim(found, double.Lambda * t)


def tighten_pooled(weights: PooledWeights) -> Claim:
    """Propose the least γ that Λ, up to a common factor t, supports through a bound of the state.

    With CᵀC ⪯ g²Λ, g = ‖CΛ^(−½)‖₂, the condition is block diagonal over frequencies:
    γ(t) = max over ω of λmax(S(ω)⁻¹(g²Λ/t + tΛÛÛᴴΛ)), minimised as in `tighten`. The result is a
    proposal: `certify_pooled` proves it.

    Raises:
        ValueError: if the weights claim a bound of their own.
        CertificateError: if S is not positive definite at some frequency.
    """
    if weights.gamma is not None:
        raise ValueError(f"the weights claim a bound of their own, {weights.gamma:g}")
    double = weights.to(torch.float64)
    state = double.state
    root = state.Lambda.sqrt()
    assert state.W is not None
    torus = Torus(len(root), *state.grid(weights.image))
    W = torus.symbols(state.W)
    U = torus.symbols(state.U)
    identity = torch.eye(len(root), dtype=torch.float64)
    H = root[:, None] * (identity - W) / root
    values, vectors = torch.linalg.eigh(H + H.mH)
    if not bool((values > 0).all()):
        raise CertificateError("2Λ − ΛW − WᵀΛ is not positive definite at some frequency")
    half = vectors / values.sqrt()[:, None, :]
    G = half.mH @ (root[:, None] * U)
    gain = float(torch.linalg.matrix_norm((double.C / root[:, None, None]).flatten(1), 2))

    def gamma(log_t: float) -> float:
        t = math.exp(log_t)
        top = torch.diag_embed(gain**2 / (t * values)).to(G.dtype) + t * G @ G.mH
        return float(torch.linalg.eigvalsh(top)[:, -1].max())

    centre = math.log(gain) - math.log(float(torch.linalg.matrix_norm(G, 2).max()))
    best = scipy.optimize.minimize_scalar(
        gamma, bounds=(centre - 5, centre + 5), method="bounded", options={"xatol": 1e-3}
    )
    found = gamma(float(best.x)) * (1 + 1e-6)  # room for the proof
    return Claim(found, state.Lambda * math.exp(float(best.x)))
