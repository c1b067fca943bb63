"""Would a claim that does not cover what runs be noticed? More faults, planted one at a time.

Radii that forget the error elsewhere in the ball, certificates that know too little, rounding that
is bounded by the wrong model, numbers at the ends of their range, other precisions than those that
are proved, and caches that miss a change.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.running import slow
from lben import (
    EquilibriumConv2d,
    EquilibriumLinear,
    SLLLinear,
    certify,
    precision,
)
from lben.certificates import Certificate, CertificateError, proof
from lben.layers import LipschitzSequential, equilibrium, normalization
from lben.layers.uniform import Running, uniform_error
from lben.models import EquilibriumClassifierConfig, FeedforwardClassifierConfig, base
from lben.models import equilibrium as models
from lben.parameterizations import FixedWeights, multipliers
from lben.radii import local as local_proofs
from lben.radii import margin as radii
from lben.radii.error_bounds import Affine
from lben.weights import DenseWeights, digest, growth
from solvers import DenseOperator, Inclusion, LeakyReLU, LinearOperator, ReLU, dependencies

Check = Callable[[], int]
F64 = torch.float64
_CONFIG = EquilibriumClassifierConfig(
    shape=(1, 3, 3), classes=3, mean=(0.5,), std=(0.5,), hidden=8, tol=1e-6
)


def _accepted(call: Callable[[], object]) -> int:
    """Return 1 if the call is not refused."""
    try:
        call()
    except (CertificateError, ValueError):
        return 0
    return 1


def inside() -> int:
    """Count images inside radii where a network whose state is slow answers otherwise."""
    wrong = 0
    for tol in (1e-2, 1e-4):
        for rho in (0.9, 0.99):
            for case in slow(F64, tol, rho):
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.simplefilter("ignore")
                    labels = case.model(case.x).argmax(1)
                    radius = case.model.certified_radius(case.x, labels, case.proof)
                    for share in (0.9, 0.999, 1 - 1e-6):
                        moved = case.x + (share * radius).view(-1, 1, 1, 1)
                        wrong += int((case.model(moved).argmax(1) != labels)[radius > 0].sum())
    return wrong


def ball() -> int:
    """Count errors beyond their bound far away from the input that is known."""
    over = 0
    for tol in (1e-2, 1e-4):
        torch.manual_seed(1)
        layer = EquilibriumLinear(6, 10, 3, gamma=None, epsilon=0.05, tol=tol, dtype=F64)
        layer.requires_grad_(False)
        exact = EquilibriumLinear(6, 10, 3, gamma=None, epsilon=0.05, tol=1e-13, dtype=F64)
        exact.parameterization = FixedWeights(layer.weights())
        x = 1e-3 * torch.randn(40, 6, dtype=F64)
        uniform = layer.forward_with_error(x, layer.certificate()).uniform
        assert uniform is not None
        for rho in (0.0, 1.0, 1e3):
            step = torch.randn_like(x)
            moved = x + rho * step / step.norm(dim=1, keepdim=True)
            error = (layer(moved) - exact(moved)).norm(dim=1)
            over += int((error > uniform.at((moved - x).norm(dim=1)) + 1e-10 * (1 + rho)).sum())
    return over


def names() -> int:
    """Count certificates that are accepted for something else."""
    torch.manual_seed(0)
    x, labels = torch.rand(2, 1, 3, 3, dtype=F64), torch.tensor([0, 1])
    model = _CONFIG.build().double().eval()
    stored = model.certificate()
    other = replace(_CONFIG, std=(0.05,)).build().double().eval()
    other.layer = model.layer
    count = _accepted(lambda: other.certified_radius(x, labels, stored))
    small = EquilibriumConv2d(1, 2, 1, image=(5, 5), circular=True, dtype=F64)
    large = EquilibriumConv2d(1, 2, 1, image=(9, 9), circular=True, dtype=F64)
    large.load_state_dict(small.state_dict())
    image = torch.randn(1, 1, 9, 9, dtype=F64)
    count += _accepted(lambda: large.forward_with_error(image, small.certificate()))
    return count + order() + local()


def order() -> int:
    """Count certificates that are accepted for layers in another order."""
    torch.manual_seed(0)
    model = FeedforwardClassifierConfig(
        shape=(1, 3, 3), classes=3, mean=(0.5,), std=(0.5,), channels=(2,), depths=(0,), pool=1,
        dense_depth=2, dense_hidden=4,
    ).build().double().eval()  # fmt: skip
    stored = model.certificate()
    *_, first, second = range(len(model.features))
    model.features[first], model.features[second] = model.features[second], model.features[first]
    return _accepted(lambda: model._check(stored))


def local() -> int:
    """Count local proofs that are accepted for another activation."""
    torch.manual_seed(0)
    model, x = _CONFIG.build().double().eval(), torch.rand(2, 1, 3, 3, dtype=F64)
    stored = model.certificate()
    around = model.local_certifier(stored)
    model.layer.activation = LeakyReLU(0.9)
    return _accepted(lambda: model.operating_points(x, model.certificate(), around))


def accumulators() -> int:
    """Count error bounds below the exact error of sums that lose half an ulp n times."""
    count = 0
    for n in (500, 2000):
        share = 0.49 * 2.0**-52
        W = torch.full((n, n), share, dtype=F64)
        W[:, 0] = 0.25  # every later product is lost beside the first
        v = torch.zeros(1, n, dtype=F64)
        z = torch.ones_like(v)
        problem = Inclusion(DenseOperator(W), v, ReLU())
        exact = Fraction(0.25) + (n - 1) * Fraction(share)
        rows = [_sequential(W[0], z[0])] * n
        wrong = math.sqrt(sum(float(Fraction(r) - exact) ** 2 for r in rows))
        count += int(wrong > float(problem.operator.rounding(z)[0]))
    return count


def _sequential(row: Tensor, z: Tensor) -> float:
    """Return the product as a plain loop rounds it."""
    total = 0.0
    for a, b in zip(row.tolist(), z.tolist(), strict=True):
        total += a * b
    return total


def tiny() -> int:
    """Count roundings of tiny inputs that are said to be nothing."""
    torch.manual_seed(0)
    layer = SLLLinear(4, 5).eval()
    x = torch.randn(8, 4) * 2.0**-140
    return int((layer.rounding(x) <= 0).sum())


def foreign() -> int:
    """Count proofs of complex weights, of which only the real part is small."""
    one = torch.zeros(1, dtype=torch.complex128)
    weights = DenseWeights(
        W=one[None], U=one[None] + 1, b=one, C=one[None] + 0.5 + 30j, D=None, b_y=one,
        Lambda=torch.ones(1, dtype=F64), gamma=1.0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _accepted(lambda: certify(weights))


def scales() -> int:
    """Count layers that stretch, with rows that are 2⁷⁶ apart."""
    layer = SLLLinear(8, 2).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        U = layer.parameterization.get_parameter("U")
        U[0, 0] = 2.0**60
        U[1, 1:] = 0.9 * 2.0**-16
        step = torch.ones(1, 8)
        step[0, 0] = 0
        try:
            y = layer(step) - layer(0 * step)
        except ValueError:
            return 0
    return int(float(y.norm()) > 1.0001 * float(step.norm()))


def denormal() -> int:
    """Count radii above the truth, among the denormal numbers."""
    unit = 2.0**-1074
    logits, label = torch.tensor([[7 * unit, 0.0]], dtype=F64), torch.tensor([0])
    pairs = torch.tensor([[1.0, 8 * unit], [8 * unit, 1.0]], dtype=F64)
    return int(float(radii.margin_radius(logits, label, pairs)) > 7 / 8)


def autocast() -> int:
    """Count outputs under autocast further from the exact ones than is said."""
    torch.manual_seed(0)
    chain, x = LipschitzSequential(SLLLinear(20, 30)).eval(), torch.randn(30, 20)
    proofs = chain.certificate((20,))
    exact = chain.double()(x.double())
    chain.float()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = chain.forward_with_error(x, proofs)
            y, error = found.value, found.error
    except ValueError:
        return 0
    return int(((y.double() - exact).norm(dim=1) > error.double() + 1e-5).sum())


def caches() -> int:
    """Count layers that run what their parameters were."""
    torch.manual_seed(0)
    count = 0
    layers: list[nn.Module] = [EquilibriumLinear(4, 5, 3), SLLLinear(4, 5)]
    for layer in layers:
        layer.eval()
        x = torch.randn(3, 4)
        with torch.no_grad():
            before = layer(x)
            next(layer.parameters()).data.mul_(1.5)
            count += int(torch.equal(layer(x), before))
    return count


CHECKS: dict[str, Check] = {
    f.__name__: f
    for f in (
        inside, ball, names, accumulators, tiny, foreign, scales, denormal,
        autocast, caches,
    )
}  # fmt: skip


def honest() -> dict[str, int]:
    """Return the violations that each check counts without a fault: all must be 0."""
    return {name: check() for name, check in CHECKS.items()}


def faults() -> Iterator[tuple[str, Callable[[], bool]]]:
    """Yield the name of each fault and a function that plants it and says whether it is caught."""

    def planted(check: Check, *changes: tuple[object, str, object]) -> Callable[[], bool]:
        def run() -> bool:
            with _planted(*changes):
                return check() > 0

        return run

    def uniform(change: Callable[[Running, Any], Affine]) -> tuple[object, str, object]:
        return (equilibrium, "uniform_error", change)

    def nowhere(layer: Running, gains: Any) -> Affine:
        return Affine(torch.zeros_like(layer.state), 0.0)

    def unmoved(layer: Running, gains: Any) -> Affine:
        return dataclasses.replace(uniform_error(layer, gains), slope=0.0)

    def without_W(layer: Running, gains: Any) -> Affine:
        return uniform_error(layer, replace(gains, residual_to_output=0.0, residual_to_state=0.0))

    def tighter(layer: Running, gains: Any) -> Affine:
        return uniform_error(dataclasses.replace(layer, tol=1e-3 * layer.tol), gains)

    yield "the error elsewhere in the ball forgotten", planted(inside, uniform(nowhere))
    yield "an error that does not grow with the ball", planted(ball, uniform(unmoved))
    yield "what a residual does through W forgotten", planted(ball, uniform(without_W))
    yield "a tolerance a thousand times too small", planted(inside, uniform(tighter))

    def by_parameters(network: nn.Module) -> str:
        return digest("", dict(network.named_parameters()))

    def unordered(network: nn.Module) -> str:
        return repr(sorted(digest("", {"": p}) for p in network.parameters()))

    yield "normalisation left out of a certificate", planted(
        names, (base, "fingerprint", by_parameters),
        (normalization, "fingerprint", by_parameters))  # fmt: skip
    yield "the order of layers left out", planted(order, (base, "fingerprint", unordered))
    yield "another torus accepted", planted(names, (Certificate, "check_image", _nothing))
    by_weights = lambda weights, *_: weights.fingerprint  # noqa: E731
    yield "a local proof tied to weights alone", planted(
        local, (models, "network_fingerprint", by_weights),
        (local_proofs, "network_fingerprint", by_weights),
        (equilibrium, "network_fingerprint", by_weights))  # fmt: skip

    def four_ulps(self: LinearOperator, z: Tensor) -> Tensor:
        return self.norm(4 * 2.0**-52 * self.mv(z).abs())

    yield "four ulps for a sum of any length", planted(
        accumulators, (LinearOperator, "rounding", four_ulps))  # fmt: skip

    def vanishing(self: growth.Growth, norm: Tensor) -> Tensor:
        return (norm.float() * self.slope).float() * 1e-7

    yield "a rounding bound that underflows", planted(tiny, (growth.Growth, "at", vanishing))
    yield "the real part of complex weights", planted(
        foreign, (proof, "read_exactly", _real), *_everywhere("read_exactly", _real))  # fmt: skip

    def in_one_unit(self: object, U: Tensor) -> Tensor:
        unit = U.abs().amax()
        V = U / unit
        return (V @ V.T).abs().sum(1) * unit**2 + torch.finfo(U.dtype).tiny

    yield "T in one unit for all rows", planted(
        scales, (multipliers.Gershgorin, "multiplier", in_one_unit))  # fmt: skip
    yield "radii rounded by relative amounts alone", planted(
        denormal, (radii, "TINY", 0.0), (radii, "_LEAST", -1.0))  # fmt: skip
    yield "errors said of a chain under autocast", planted(
        autocast, (precision, "refuse_autocast", lambda: None))  # fmt: skip
    yield "caches that look at shapes", planted(
        caches, (dependencies, "_compare_on_host", lambda a, b: a.shape == b.shape))  # fmt: skip


def _real(weights: Any) -> Any:
    return weights.apply(lambda t: t.real.double() if t.is_complex() else t.double())


def _everywhere(name: str, value: object) -> list[tuple[object, str, object]]:
    """Return the change for every module of certificates that has imported the name."""
    from lben.certificates import convolutional, dense, linf, pairs

    return [(module, name, value) for module in (dense, convolutional, linf, pairs)]


def _nothing(*_: object, **__: object) -> None:
    return None


@contextmanager
def _planted(*changes: tuple[object, str, object]) -> Iterator[None]:
    with ExitStack() as stack:
        for target, name, value in changes:
            stack.enter_context(patch.object(target, name, value))
        yield
