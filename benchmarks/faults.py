"""Would a mistake be noticed? Faults that are planted, one at a time, and the checks that look.

A fault is caught when a proof is refused, or when a check counts a violation. Without a fault every
check must pass: `honest` runs them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from benchmarks.common import trained
from lben import rigorous
from lben.certificates import CertificateError, Claim, certify
from lben.certificates import pairs as pairs_proof
from lben.data import Dataset, pixels
from lben.evaluation.attacks import across_the_boundary, apgd_l2, ascend_quotient
from lben.layers import SLLConv2d, SLLLinear, equilibrium
from lben.layers.normalization import Normalize
from lben.models import CertifiedLogits, EquilibriumClassifier
from lben.models import equilibrium as models
from lben.parameterizations import DirectParameterization
from lben.radii import local
from lben.radii import margin as radii
from lben.radii.error_bounds import Affine
from lben.rigorous import Enclosure
from lben.tightening import tighten_pairs
from lben.weights import ConvolutionalWeights, DenseWeights
from solvers import Constants, DenseOperator, Inclusion, ReLU

Check = Callable[[], int]


class Bench:
    """The checks: each returns how many violations it counts.

    Args:
        data: MNIST.
    """

    def __init__(self, data: Dataset) -> None:
        self._x = pixels(data.test_images[:400], torch.float64)
        self._labels = data.test_labels[:400]
        self.exact = trained("1").to_exact(1e-11)
        self._sides = {
            distance: across_the_boundary(
                self.exact, self._x[:100], self._x[200:300], distance=distance
            )
            for distance in (2e-3, 3e-7)
        }

    def radii(
        self, tol: float = 1e-9, dtype: torch.dtype = torch.float64, distance: float = 2e-3
    ) -> int:
        """Count radii that reach across the boundary of the exact network."""
        model: EquilibriumClassifier = trained("1").to_exact(tol).to(dtype)
        model.layer.on_failure = "warn"
        near, other = self._sides[distance]
        near = near.to(dtype)
        across = self.exact(other).argmax(1)
        labels = model(near).argmax(1)
        proof = model.certificate(bound="scaled")
        radius = model.certified_radius(near, labels, proof, promise="exact")
        reach = (near.double() - other).flatten(1).norm(dim=1)
        return int(((radius >= reach) & (labels != across)).sum())

    def attacked(self) -> int:
        """Count images that an attack breaks within their certified radius."""
        model, x, labels = self.exact, self._x[:20], self._labels[:20]
        radius = model.certified_radius(x, labels, model.certificate(bound="scaled"))
        return sum(
            int(apgd_l2(model, x[i : i + 1], labels[i : i + 1], float(r), steps=15)[1])
            for i, r in enumerate(radius)
            if r > 0
        )

    def local(self) -> int:
        """Count local radii that reach a boundary that is known.

        y = (1, 10 max(x − 1, 0)), through a state that feeds back: at x = 0 it is 1.1 away.
        """
        one = torch.ones(1, 1, dtype=torch.float64)
        weights = DenseWeights(
            W=-0.5 * one, U=1.5 * one, b=-1.5 * one[0], C=torch.cat([0 * one, 10 * one]), D=None,
            b_y=torch.cat([one[0], 0 * one[0]]), Lambda=one[0], gamma=None,
        )  # fmt: skip
        v, y = -1.5 * one, torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        operating_points = local.OperatingPoints(v=v, v_error=0 * v, logits=y, logit_error=0 * v[0])
        proof = local.LocalCertifier(weights, ReLU())
        label, start = torch.tensor([0]), torch.tensor([0.07], dtype=torch.float64)
        box_slack = torch.tensor([[[0.0], [math.inf]]]).double()
        there = replace(operating_points, box_slack=box_slack)  # x cannot fall, nor has it to
        radii = [proof.radius(a, label, start, steps=12) for a in (operating_points, there)]
        return sum(int((radius > 1.1).sum()) for radius in radii)

    def quotients(self) -> int:
        """Count pairs whose quotient exceeds the bound."""
        bound = self.exact.certificate(bound="diagonal").bound
        found = ascend_quotient(self.exact, self._x[:5], steps=40)
        return int((found.quotient > bound).sum())

    def pairs(self) -> int:
        """Count differences of logits that change faster than the bounds of the pairs."""
        bounds = self.exact.certificate(bound="diagonal pairs").pairs
        assert bounds is not None
        count = 0
        for i, j in ((0, 1), (3, 5), (4, 9)):
            found = ascend_quotient(Difference(self.exact, i, j), self._x[:3], steps=30)
            count += int((found.quotient > bounds[i][j]).sum())
        return count

    def states(self) -> int:
        """Count states further from the solution than their error bound.

        z = (1 − m)z + v is the problem whose bound has nothing to spare: all units are active, and
        every error shrinks by m.
        """
        weights = self._slow()
        v = torch.rand(5, 3, dtype=torch.float64) + 0.1
        problem = Inclusion(DenseOperator(weights.W, weights.Lambda), v, ReLU())
        proof = certify(weights)
        exact = v / self._m
        found = [0.9 * exact, 1.1 * exact]
        return sum(
            int(((z - exact).norm(dim=1) > problem.error_bound(z, proof.constants)).sum())
            for z in found
        )

    def logits(self) -> int:
        """Count logits of that problem further from the exact ones than their error bound."""
        proof = certify(self._slow())
        error = torch.rand(5, dtype=torch.float64)
        bound = vars(equilibrium)["logit_error"](proof, error, 0 * error, 0 * error)
        return int((2 * error > bound).sum())

    _m = 0.125

    def _slow(self) -> DenseWeights:
        identity = torch.eye(3, dtype=torch.float64)
        nothing = torch.zeros(3, dtype=torch.float64)
        return DenseWeights(
            W=(1 - self._m) * identity, U=identity, b=nothing, C=2 * identity, D=None, b_y=nothing,
            Lambda=torch.ones(3, dtype=torch.float64), gamma=None,
        )  # fmt: skip

    def eigenvalues(self) -> int:
        """Count bounds of eigenvalues on the wrong side of the exact ones, which are integers."""
        count, generator = 0, np.random.default_rng(0)
        H = scipy.linalg.hadamard(16).astype(float)
        for _ in range(40):
            values = np.concatenate([[1.0], generator.integers(2, 2**36, 15)])
            matrix = Enclosure((H * values) @ H.T)  # exact: integers below 2⁵³
            count += rigorous.smallest_eigenvalue_bound(matrix) > 16 * values.min()
            count += rigorous.norm_bound(matrix) < 16 * values.max()
        return int(count)


class Difference(nn.Module):
    """yᵢ − yⱼ of a classifier."""

    def __init__(self, model: nn.Module, i: int, j: int) -> None:
        super().__init__()
        self.model, self.i, self.j = model, i, j

    def forward(self, x: Tensor) -> Tensor:
        """Return one number per image."""
        y = self.model(x)
        return (y[:, self.i] - y[:, self.j])[:, None]


def tight(feedthrough: bool = False) -> tuple[DirectParameterization, DenseWeights]:
    """Return a parameterization with hardly any slack and Λ far from I, and its weights."""
    torch.manual_seed(0)
    free = DirectParameterization(
        6, 10, 4, gamma=1.5, epsilon=1e-7, feedthrough=feedthrough, dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in free.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
        free.V.mul_(1e-4)
        return free, free()


def _refused(weights: DenseWeights) -> bool:
    try:
        certify(weights)
    except CertificateError:
        return True
    return False


def _weight_faults() -> Iterator[tuple[str, Callable[[], bool]]]:
    """Mistakes in a parameterization, which give other weights."""
    free, w = tight()
    with torch.no_grad():
        Lambda, gamma = w.Lambda, 1.5
        inverse = 1 / Lambda[:, None]
        skew, square = inverse * (free.N - free.N.T), inverse * (free.V.T @ free.V)
        G = Lambda[:, None] * w.U
        outputs, inputs = inverse * (w.C.T @ w.C) / (2 * gamma), inverse * (G @ G.T) / (2 * gamma)
        loud = inverse * torch.eye(10, dtype=torch.float64) * 0.1
    changes: dict[str, dict[str, Any]] = {
        "the term of C is missing": {"W": w.W + outputs},
        "the term of U is missing": {"W": w.W + inputs},
        "half of the term of C": {"W": w.W + outputs / 2},
        "VᵀV with the wrong sign": {"W": w.W + square + 2 * loud},
        "N + Nᵀ for N − Nᵀ": {"W": w.W + skew - inverse * (free.N + free.N.T)},
        "Λ in place of Λ⁻¹": {"W": w.W + (inverse - Lambda[:, None]) * (outputs + inputs) * Lambda},
        "Λ forgotten in U": {"W": w.W + inputs - inverse * (w.U @ w.U.T) / (2 * gamma) / 4},
        "C larger by 1e-5": {"C": w.C * (1 + 1e-5)},
        "U larger by 1e-5": {"U": w.U * (1 + 1e-5)},
        "γ claimed 1e-5 too small": {"gamma": gamma * (1 - 1e-5)},
        "Λ of other weights": {"Lambda": Lambda.flip(0)},
        "W rounded to bfloat16": {"W": w.W.bfloat16().double()},
    }
    for name, change in changes.items():
        yield name, partial(_refused, replace(w, **change))
    _, through = tight(feedthrough=True)
    assert through.D is not None
    larger = replace(through, D=through.D * (1 + 1e-4))
    yield "D larger by 1e-4", partial(_refused, larger)
    yield "D's share of the bound is forgotten", lambda: _refused(replace(w, D=0.3 * w.C[:, :6]))


def _layer_faults() -> Iterator[tuple[str, Callable[[], bool]]]:
    """Mistakes in T, seen by the proof of the layer."""
    torch.manual_seed(0)
    dense = SLLLinear(12, 16, dtype=torch.float64).weights()
    conv = SLLConv2d(3, 6, dtype=torch.float64).weights()
    assert isinstance(dense, DenseWeights)
    assert isinstance(conv, ConvolutionalWeights)

    def with_T(T: Tensor) -> DenseWeights:
        return replace(dense, C=-2 * dense.U.T / T, Lambda=2 / T)

    gram = dense.U @ dense.U.T
    yield "T without absolute values", lambda: _refused(with_T(gram.sum(1).abs() + 1e-3))
    yield "T from the diagonal alone", lambda: _refused(with_T(gram.diagonal()))
    yield "T a power iteration from below", lambda: _refused(
        with_T(torch.full((16,), 0.999 * float(torch.linalg.matrix_norm(gram, 2)),
                          dtype=torch.float64)))  # fmt: skip
    yield "2.01 for 2 in a residual layer", lambda: _refused(replace(dense, C=1.005 * dense.C))

    def convolution() -> bool:
        # The products of a kernel with itself that reach over the edge are left out.
        U = conv.U
        products = torch.einsum("ickl,jckl->ij", U, U).abs().sum(1)
        faulty = replace(
            conv, C=-2 * (U / products[:, None, None, None]).transpose(0, 1).flip(2, 3),
            Lambda=2 / products,
        )  # fmt: skip
        try:
            certify(faulty, image=(8, 8))
        except CertificateError:
            return True
        return False

    yield "T of a convolution without its shifts", convolution


@contextmanager
def _planted(*changes: tuple[object, str, object]) -> Iterator[None]:
    with ExitStack() as stack:
        for target, name, value in changes:
            stack.enter_context(patch.object(target, name, value))
        yield


def _code_faults(bench: Bench) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Mistakes in the code of proofs, radii and solvers, seen by the checks."""

    def planted(check: Check, *changes: tuple[object, str, object]) -> Callable[[], bool]:
        def run() -> bool:
            with _planted(*changes):
                try:
                    return check() > 0
                except CertificateError:
                    return True

        return run

    half_gain = property(lambda self: 1.0)
    yield "γ for √2γ", planted(bench.radii, (radii, "ROOT2", 1.0))
    yield "normalisation forgotten", planted(bench.radii, (Normalize, "gain", half_gain))
    yield "the largest deviation instead of the smallest", planted(
        bench.radii, (Normalize, "gain", property(lambda self: 2.0)))  # fmt: skip
    loose = partial(bench.radii, 1e-1)

    def nothing(proof: object, error: Tensor, *more: object) -> Tensor:
        return torch.zeros_like(error)

    yield "solver error forgotten", planted(loose, (equilibrium, "logit_error", nothing))
    single = partial(bench.radii, 1e-6, torch.float32, 3e-7)
    yield "rounding of float32 forgotten", planted(
        single, (EquilibriumClassifier, "forward_with_error", _without_error))  # fmt: skip
    of_logits, error_bound = radii.logit_error, Inclusion.error_bound
    yield "the gain of C forgotten", planted(
        bench.logits,
        (equilibrium, "logit_error", lambda proof, *errors: of_logits(
            replace(proof, output_gain=1.0), *errors)),
    )  # fmt: skip
    yield "m twice too large", planted(
        bench.states,
        (Inclusion, "error_bound", lambda self, z, c: error_bound(
            self, z, Constants(m=2 * c.m, L=c.L))),
    )  # fmt: skip
    yield (
        "a residual taken for the error",
        planted(
            bench.states,
            (Inclusion, "error_bound", lambda self, z, c: self.operator.norm(self.image(z) - z)),
        ),
    )
    smallest = lambda matrix: float(np.linalg.eigvalsh(matrix.mid)[0])  # noqa: E731
    yield "a computed eigenvalue taken for a proof", planted(
        bench.eigenvalues, (rigorous, "smallest_eigenvalue_bound", smallest))  # fmt: skip
    yield (
        "a norm rounded to the nearest",
        planted(
            bench.eigenvalues,
            (rigorous, "norm_bound", lambda matrix: float(np.linalg.norm(matrix.mid, 2))),
        ),
    )
    propose = tighten_pairs
    yield "proofs of pairs whose result is not looked at", planted(
        bench.pairs,
        (models, "tighten_pairs", lambda *a, **k: {
            pair: Claim(0.5 * (c.gamma or 0.0), c.Lambda) for pair, c in propose(*a, **k).items()}),
        (pairs_proof, "require", lambda margin, *a: margin),
    )  # fmt: skip
    gains = local.LocalCertifier._prove_gains
    yield (
        "pre-activations said to move a tenth as far",
        planted(
            bench.local,
            (local.LocalCertifier, "_prove_gains", lambda self, units: 0.1 * gains(self, units)),
        ),
    )
    slope_bounds = ReLU.slope_bounds
    yield (
        "slopes of the branch that a unit is on",
        planted(
            bench.local,
            (
                ReLU,
                "slope_bounds",
                lambda self, v, reach, error: slope_bounds(self, v, 0 * reach, 0 * error),
            ),
        ),
    )
    yield "local proofs that are not checked, of bounds too small", planted(
        bench.local,
        (local, "prove_local_claim", lambda *a: 1.0),
        (local, "tighten_locally", lambda problem, target=None: (
            target if target is not None else 13 + 0 * problem.low[:, 0], 1 + 0 * problem.low)),
    )  # fmt: skip
    prove = local.LocalCertifier._prove_with_constraints
    yield "room on the other side", planted(
        bench.local,
        (local.LocalCertifier, "_prove_with_constraints", lambda self, operating_points, *a: prove(
            self, replace(operating_points, box_slack=operating_points.box_slack.flip(1)), *a)),
    )  # fmt: skip
    yield "facts that nothing supports", planted(
        bench.local,
        (ReLU, "lower_lines", lambda self, v, error: ((1e3, 0 * v),)),
    )  # fmt: skip


def _without_error(model: EquilibriumClassifier, x: Tensor, certificate: object) -> CertifiedLogits:
    nothing = x.new_zeros(len(x))
    around = Affine(nothing.double(), 0.0)
    return CertifiedLogits(value=model(x), error=nothing, uniform=around)


def other_weights(bench: Bench) -> bool:
    """A certificate shown for weights that have moved by one unit in the last place."""
    model = bench.exact
    certificate = model.layer.certificate()
    w = model.layer.weights()
    moved = replace(w, b=torch.nextafter(w.b, torch.full_like(w.b, math.inf)))
    try:
        certificate.check(moved)
    except CertificateError:
        return True
    return False


def honest(bench: Bench) -> dict[str, int]:
    """Return the violations that each check counts without a fault: all must be 0."""
    certify(tight()[1])
    certify(tight(feedthrough=True)[1])
    checks: dict[str, Check] = {
        "radii": bench.radii,
        "radii, tolerance 0.1": partial(bench.radii, 1e-1),
        "radii, float32": partial(bench.radii, 1e-6, torch.float32, 3e-7),
        "attacked": bench.attacked,
        "local": bench.local,
        "quotients": bench.quotients,
        "pairs": bench.pairs,
        "states": bench.states,
        "logits": bench.logits,
        "eigenvalues": bench.eigenvalues,
    }
    return {name: check() for name, check in checks.items()}


def faults(bench: Bench) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Yield the name of each fault and a function that plants it and says whether it is caught."""
    yield from _weight_faults()
    yield from _layer_faults()
    yield from _code_faults(bench)
    yield "a certificate of other weights", lambda: other_weights(bench)
