"""Does an operator, activation or method of your own keep the laws that the package relies on?

Each noun has a suite of laws. Subclass it in pytest, or call its `check_` function anywhere: an
AssertionError names the law that fails.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from solvers import (
    DenseOperator,
    Inclusion,
    LinearOperator,
    Method,
    PeacemanRachford,
    ProximalActivation,
    ReLU,
    Solution,
    SolveWarning,
    Status,
    Tanh,
    equilibrium,
    solve,
)
from solvers.activations import Step

BOTH = (torch.float32, torch.float64)
_DOUBLE = torch.float64


class Laws:
    """A suite of laws: methods that begin with `test_` and raise AssertionError.

    Example:
        >>> from solvers.testing import OperatorLaws
        >>> "test_transpose_is_the_adjoint" in OperatorLaws.names()
        True
    """

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the laws."""
        kinds = reversed(cls.__mro__)
        found = (name for kind in kinds for name in vars(kind) if name.startswith("test_"))
        return list(dict.fromkeys(found))

    def check(self) -> None:
        """Check all laws.

        Raises:
            AssertionError: at the first law that fails, with its name.
        """
        for name in self.names():
            try:
                getattr(self, name)()
            except AssertionError as error:
                raise AssertionError(f"{name.replace('_', ' ')[5:]}: {error}") from error


class OperatorLaws(Laws):
    """What every `LinearOperator` promises, for W, its transpose and that one's transpose.

    Define `make_operator` for a W of about ten units: some laws are tried in rational arithmetic,
    some by finite differences. I − W must be strongly monotone.

    Example:
        >>> import torch
        >>> from solvers import DenseOperator
        >>> from solvers.testing import OperatorLaws
        >>> class TestDense(OperatorLaws):
        ...     def make_operator(self, dtype):
        ...         return DenseOperator(-torch.eye(4, dtype=dtype))
        >>> TestDense().check()
    """

    dtypes: tuple[torch.dtype, ...] = BOTH
    """The types that the laws are tried in."""

    def make_operator(self, dtype: torch.dtype) -> LinearOperator:
        """Return W on tensors of its own, the same W at every call."""
        raise NotImplementedError(f"{type(self).__name__} must define make_operator(dtype)")

    def make_steps(self, W: LinearOperator) -> list[Step]:
        """Return the step sizes α that resolvents are tried with."""
        return [0.3, 4.0, torch.linspace(0.2, 3, W.n, dtype=W.dtype, device=W.device)]

    def each(self) -> Iterator[LinearOperator]:
        """Yield what a law is tried on."""
        for dtype in self.dtypes:
            W = self.make_operator(dtype)
            yield from (W, W.T, W.T.T)

    def test_products_are_linear(self) -> None:
        """W(az + by) = aWz + bWy, for every batch shape, and affine(z, v) = Wz + v."""
        for W in self.each():
            z, y = _random(W, 2, 3)
            _near(W.mv(2 * z - y), 2 * W.mv(z).double() - W.mv(y).double(), W, "mv(2z − y)", 30)
            matrix = written_out(W)
            stacked = _random(W, 2, 3)
            _near(W.mv(stacked), stacked.double() @ matrix.T, W, "mv of two batch dimensions", 10)
            _near(W.mv(z[0]), matrix @ z[0].double(), W, "mv without a batch dimension", 10)
            _near(W.affine(z, y), z.double() @ matrix.T + y.double(), W, "affine(z, v)", 10)
            _require(W.mv(z).dtype == W.dtype, f"mv of {W.dtype} returns {W.mv(z).dtype}")

    def test_transpose_is_the_adjoint(self) -> None:
        """⟨Wz, y⟩ = ⟨z, Wᵀy⟩ by `rmv` and by `T`, whose metric is Λ⁻¹."""
        for W in self.each():
            z, y = _random(W, 2, 5)
            inner = (W.mv(z).double() * y.double()).sum(-1)
            _near((z.double() * W.T.mv(y).double()).sum(-1), inner, W, "⟨z, T.mv(y)⟩", 30)
            _near((z.double() * W.rmv(y).double()).sum(-1), inner, W, "⟨z, rmv(y)⟩", 30)
            _near(W.T.metric, 1 / W.metric.double(), W, "the metric of the transpose")
            _require(W.T.transposed is not W.transposed, "W and W.T have the same orientation")
            _require(W.n == len(W.metric), f"n = {W.n}, but the metric has {len(W.metric)}")

    def test_resolvent_inverts(self) -> None:
        """z = resolvent(α).solve(x) has z + α(z − Wz) = x; so have its transposes."""
        for W in self.each():
            for step in self.make_steps(W):
                x = _random(W, 6)
                R = W.resolvent(step)
                z, y = R.solve(x), R.T.solve(x)
                _near(z + step * (z - W.mv(z)), x.double(), W, "(I + α(I − W))R x", 100)
                _near(y + step * (y - W.T.mv(y)), x.double(), W, "(I + α(I − Wᵀ))R.T x", 100)
                _near(W.T.resolvent(step).solve(x), y.double(), W, "T.resolvent(α)", 30)
                _near(R.T.T.solve(x), z.double(), W, "the transpose's transpose", 30)
                _near(R.solve(x[0]), z[0].double(), W, "the resolvent of one sample", 30)

    def test_reflection_is_twice_the_resolvent_minus_identity(self) -> None:
        """reflection().add(x, shift, out) = shift + 2Rx − x; x and shift are left alone."""
        for W in self.each():
            for step in self.make_steps(W):
                R = W.resolvent(step)
                x, shift = _random(W, 2, 6)
                expected = shift.double() + 2 * R.solve(x).double() - x.double()
                self._check_map(W, R.reflection(), x, shift, expected, "the reflection")

    def test_relaxation_mixes_with_the_identity(self) -> None:
        """relax(α).add(x, shift, out) = shift + (1 − α)x + αWx; x and shift are left alone."""
        for W in self.each():
            for step in self.make_steps(W):
                x, shift = _random(W, 2, 6)
                expected = (shift + (1 - step) * x + step * W.mv(x)).double()
                self._check_map(W, W.relax(step), x, shift, expected, "the relaxation")

    def _check_map(
        self, W: LinearOperator, map_: object, x: Tensor, shift: Tensor, expected: Tensor, name: str
    ) -> None:
        before = x.clone(), shift.clone()
        add = getattr(map_, "add")  # noqa: B009
        _near(add(x, shift, None), expected, W, f"{name} without out", 60)
        out = torch.full_like(x, torch.nan)
        returned = add(x, shift, out)
        _require(returned.data_ptr() == out.data_ptr(), f"{name} does not return `out`")
        _near(out, expected, W, f"{name} with out", 60)
        same = torch.equal(x, before[0]) and torch.equal(shift, before[1])
        _require(same, f"{name} overwrites its arguments")

    def test_constants_hold(self) -> None:
        """⟨(I − W)z, z⟩_Λ ≥ m‖z‖²_Λ and ‖(I − W)z‖_Λ ≤ L‖z‖_Λ, also for the worst z."""
        for given in self.each():
            W = given.to(_DOUBLE)
            c, root = W.constants(), W.metric.sqrt()
            H = root[:, None] * (torch.eye(W.n, dtype=_DOUBLE) - written_out(W)) / root
            lowest = torch.linalg.eigh(0.5 * (H + H.T))[1][:, 0]
            largest = torch.linalg.svd(H)[2][0]
            z = torch.cat([_random(W, 200), torch.stack([lowest, largest]) / root])
            Az, size = z - W.mv(z), W.norm(z)
            m = float(((W.metric * Az * z).sum(-1) / size**2).min())
            L = float((W.norm(Az) / size).max())
            rounding = 1e-13 * W.n * L
            _require(c.m <= m + rounding, f"m = {c.m}, but a z has {m}")
            _require(L - rounding <= c.L, f"L = {c.L}, but a z has {L}")
            _require(W.is_monotone() or c.m <= 0, f"m = {c.m} > 0, but is_monotone() denies it")
            _require(given.is_monotone() == given.T.is_monotone(), "W and W.T disagree on m > 0")

    def test_rounding_bound_holds(self) -> None:
        """‖fl(Wz) − Wz‖_Λ ≤ rounding(z) in rational arithmetic, for z of all sizes."""
        for W in self.each():
            exact, (metric,) = _fractions(written_out(W.to(_DOUBLE))), _fractions(W.metric[None])
            finfo = torch.finfo(W.dtype)
            for z in self._hard(W):
                for flush in (False, True):
                    with _flushed(flush):
                        product, bound = W.mv(z), W.rounding(z)
                    _require(bound.dtype == _DOUBLE, f"rounding(z) is {bound.dtype}")
                    for x, y, b in zip(_fractions(z), _fractions(product), bound, strict=True):
                        missed = [
                            a - sum((w * c for w, c in zip(row, x, strict=True)), Fraction(0))
                            for a, row in zip(y, exact, strict=True)
                        ]
                        error = sum(
                            (q * e * e for q, e in zip(metric, missed, strict=True)), Fraction(0)
                        )
                        holds = float(b) == math.inf or error <= Fraction(float(b)) ** 2
                        _require(
                            holds,
                            f"rounding(z) = {float(b):.3g}, mv errs by {_root(error):.3g}",
                        )
            gain, z = W.rounding_gain(W.dtype), _random(W, 20)
            above = float((W.rounding(z) / W.to(_DOUBLE).norm(z.double())).max())
            allowed = gain * (1 + 1e-3) + finfo.tiny * 1e6
            _require(above <= allowed, f"rounding_gain = {gain:.3g}, but a z has {above:.3g}")

    def _hard(self, W: LinearOperator) -> list[Tensor]:
        """Return samples of ordinary sizes, of sizes far apart, and of the smallest sizes."""
        z, finfo = _random(W, 3), torch.finfo(W.dtype)
        spread = z * 2.0 ** torch.randint(-20, 21, z.shape, generator=_generator(1)).to(z.device)
        return [z, spread, z * finfo.tiny, z * finfo.smallest_normal**0.5]

    def test_magnitude_is_above_the_entries(self) -> None:
        """magnitude(z) ≥ |W|z for z ≥ 0, up to its own rounding."""
        for W in self.each():
            z = _random(W, 5).abs()
            expected = z.double() @ written_out(W).abs().T
            slack = (1 + 8 * (W.n + W.summands) * torch.finfo(W.dtype).eps) * W.magnitude(
                z
            ).double()
            _require(bool((slack >= expected - 1e-30).all()), "magnitude(z) is below |W|z")

    def test_entries_agree_with_products(self) -> None:
        """Diagonal and submatrix are those of the matrix that products write out."""
        for W in self.each():
            matrix, g = written_out(W), _generator(2)
            _near(W.diagonal(), matrix.diagonal(), W, "diagonal()", 3)
            rows, columns = (torch.randint(W.n, (3, k), generator=g) for k in (4, 2))
            picked = torch.stack([matrix[r][:, c] for r, c in zip(rows, columns, strict=True)])
            _near(W.submatrix(rows, columns), picked, W, "submatrix of a batch", 3)
            first = torch.stack([matrix[rows[0]][:, c] for c in columns])
            _near(W.submatrix(rows[0], columns), first, W, "submatrix of one batch", 3)

    def test_determinant_agrees_with_products(self) -> None:
        """log_determinant() = log |det(I − W)|, the same for W and Wᵀ."""
        for W in self.each():
            I_minus_W = torch.eye(W.n, dtype=_DOUBLE) - written_out(W)
            expected = torch.linalg.slogdet(I_minus_W)[1]
            for found in (W.log_determinant(), W.T.log_determinant()):
                _near(torch.tensor(found, dtype=_DOUBLE), expected, W, "log_determinant()", 10)

    def test_factors_follow_a_write(self) -> None:
        """After a write to the tensors of W everything is that of the new numbers."""
        for W in self.each():
            if not W.tensors:
                continue
            views = (W, W.T, W.rebuild(tuple(t.detach() for t in W.tensors)))
            for view in views:
                view.resolvent(0.3), view.constants(), view.log_determinant(), view.diagonal()
                view.to(_DOUBLE if W.dtype == torch.float32 else torch.float32)
            with torch.no_grad():
                W.tensors[0].mul_(0.5)
            for view in views:
                matrix = written_out(view)
                _near(view.diagonal(), matrix.diagonal(), W, "diagonal() after a write", 3)
                x = _random(W, 2)
                z = view.resolvent(0.3).solve(x)
                _near(z + 0.3 * (z - view.mv(z)), x.double(), W, "resolvent after a write", 60)
                other = view.to(_DOUBLE if W.dtype == torch.float32 else torch.float32)
                converted = written_out(other).to(matrix)
                _near(converted, matrix, torch.float32, "to(dtype) after a write")

    def test_rebuilt_operators_share_factors(self) -> None:
        """rebuild(t) has the tensors t themselves, the same W, and what W has cached."""
        for W in self.each():
            tensors = tuple(t.detach().clone().requires_grad_() for t in W.tensors)
            rebuilt = W.rebuild(tensors)
            _require(len(rebuilt.tensors) == len(tensors), "rebuild changes how many tensors")
            same = all(a is b for a, b in zip(rebuilt.tensors, tensors, strict=True))
            _require(same, "rebuild(t).tensors are not t")
            _near(written_out(rebuilt), written_out(W), W, "the products of rebuild(t)")
            stored = W.memo("law", object)
            shared = all(w.memo("law", object) is stored for w in (rebuilt, rebuilt.T, W.T))
            _require(shared, "rebuild(t), T and W have different memos")

    def test_pullback_is_the_gradient_of_a_product(self) -> None:
        """pullback(u, z) = ∇ Σ⟨u, Wz⟩ with respect to `tensors`, and is differentiable."""
        for W in self.each():
            tensors = tuple(t.detach().clone().requires_grad_() for t in W.tensors)
            if not tensors:
                continue
            u, z = _random(W, 2, 2, 3)
            rebuilt = W.rebuild(tensors)
            found = rebuilt.pullback(u, z)
            gradient = torch.autograd.grad((u * rebuilt.mv(z)).sum(), tensors)
            for f, g in zip(found, gradient, strict=True):
                _require(f.shape == g.shape, f"pullback has shape {tuple(f.shape)}")
                _near(f, g.double(), W, "pullback(u, z)", 30)
            if W.dtype == _DOUBLE:
                u, z = (t[0].detach().requires_grad_() for t in (u, z))
                _gradcheck(lambda u, z, *t: W.rebuild(t).pullback(u, z), (u, z, *tensors))  # noqa: B023

    def test_other_precisions_are_the_same_operator(self) -> None:
        """to(dtype) is W in that precision, without a graph, built once."""
        for W in self.each():
            _require(W.to(W.dtype) is W, "to(own dtype) is not W itself")
            other = _DOUBLE if W.dtype == torch.float32 else torch.float32
            converted = W.to(other)
            _require(converted is W.to(other), "to(dtype) builds at every call")
            parts = (*converted.tensors, converted.metric)
            _require(all(t.dtype == other for t in parts), f"to({other}) leaves another dtype")
            _near(written_out(converted), written_out(W), torch.float32, "products in float32")
            _near(converted.metric, W.metric.double(), torch.float32, "the metric in float32")

    def test_copies_are_the_same_operator(self) -> None:
        """A copy has the same products and a memo of its own."""
        for W in self.each():
            stored = W.memo("law", object)
            other = copy.deepcopy(W)
            _near(written_out(other), written_out(W), W, "the products of a copy")
            _require(other.memo("law", object) is not stored, "a copy shares the memo")

    def test_equilibria_are_found_and_differentiated(self) -> None:
        """z = σ(Wz + v) is solved within the error bound, with the gradient in v and `tensors`."""
        for W in self.each():
            _require(W.is_monotone(), "I − W is not strongly monotone: test another operator")
            v = _random(W, 3)
            check_solution(solve(Inclusion(W, v, ReLU()), tol=_tolerance(W.dtype)), W, v)
            if W.dtype == _DOUBLE:
                tensors = tuple(t.detach().clone() for t in (v, *W.tensors))

                def find(v: Tensor, *t: Tensor, W: LinearOperator = W) -> Tensor:
                    problem = Inclusion(W.rebuild(t), v, Tanh())
                    return equilibrium(problem, tol=1e-13, max_steps=20000).value

                _gradcheck(find, tuple(t.requires_grad_() for t in tensors))


def check_operator(operator: LinearOperator) -> None:
    """Check the laws of `OperatorLaws` on an operator of about ten units, float32 and float64.

    Args:
        operator: W; copies of it are tested.

    Raises:
        AssertionError: at the first law that fails, with its name.

    Example:
        >>> import torch
        >>> from solvers import DenseOperator
        >>> from solvers.testing import check_operator
        >>> class Wrong(DenseOperator):
        ...     def rmv(self, z):
        ...         return self.mv(z)
        >>> try:
        ...     check_operator(Wrong(torch.tensor([[-1.0, 1.0], [0.0, -1.0]])))
        ... except AssertionError as error:
        ...     print(str(error).split(",")[0])
        transpose is the adjoint: ⟨z
    """

    class Given(OperatorLaws):
        def make_operator(self, dtype: torch.dtype) -> LinearOperator:
            return copy.deepcopy(operator.to(dtype))

    Given().check()


class ActivationLaws(Laws):
    """What every `ProximalActivation` promises.

    Define `make_activation`; `units` where σ differs by unit.

    Example:
        >>> import solvers
        >>> from solvers.testing import ActivationLaws
        >>> class TestTanh(ActivationLaws):
        ...     def make_activation(self):
        ...         return solvers.Tanh()
        >>> TestTanh().check()
    """

    units: int = 5
    """Units of the samples that σ is applied to."""
    steps: tuple[float, ...] = (1e-3, 0.3, 1.0, 4.0, 1e3)
    """Step sizes α that the prox is tried with."""

    def make_activation(self) -> ProximalActivation:
        """Return σ, for float64 samples."""
        raise NotImplementedError(f"{type(self).__name__} must define make_activation()")

    def _points(self, seed: int = 0) -> Float[Tensor, "200 units"]:
        x = torch.randn(200, self.units, dtype=_DOUBLE, generator=_generator(seed))
        sizes = torch.tensor([1e-3, 0.1, 1, 10, 100.0], dtype=_DOUBLE)
        return x * sizes.repeat(40)[:, None]

    def test_prox_at_step_one_is_the_activation(self) -> None:
        """prox(x, 1) = σ(x)."""
        sigma, x = self.make_activation(), self._points()
        _close(sigma.prox(x, 1.0), sigma(x), 1e-12, 1e-14, "prox(x, 1)")

    def test_prox_solves_its_optimality_condition(self) -> None:
        """prox(x, α) = σ(p) where (1 − α)σ(p) + αp = x."""
        sigma, p = self.make_activation(), self._points().clamp(-30, 30)
        for step in self.steps:
            x = (1 - step) * sigma(p) + step * p
            _close(sigma.prox(x, step), sigma(p), 1e-9, 1e-9, f"prox(x, {step})")

    def test_prox_is_firmly_non_expansive(self) -> None:
        """|Δprox|² ≤ Δprox · Δx."""
        sigma, x, y = self.make_activation(), self._points(), self._points(1)
        for step in self.steps:
            change = sigma.prox(x, step) - sigma.prox(y, step)
            excess = float((change**2 - change * (x - y) - 1e-9 * (x - y).abs()).max())
            _require(excess <= 0, f"prox at step {step} expands by {excess:.1e}")

    def test_prox_takes_one_step_per_unit(self) -> None:
        """A vector of steps is one step for each unit."""
        sigma, x = self.make_activation(), self._points()
        steps = torch.linspace(0.1, 9, self.units, dtype=_DOUBLE)
        together = sigma.prox(x, steps)
        for unit, step in enumerate(steps):
            alone = sigma.prox(x, float(step))[:, unit]
            _close(together[:, unit], alone, 1e-12, 1e-15, f"prox at step {float(step)}")

    def test_reflector_is_twice_the_prox_minus_identity(self) -> None:
        """reflector(α)(x) = 2 prox(x, α) − x."""
        sigma, x = self.make_activation(), self._points()
        for step in self.steps:
            expected = 2 * sigma.prox(x, step) - x
            _close(sigma.reflector(step)(x.clone()), expected, 1e-9, 1e-9, f"reflector({step})")

    def test_slope_is_the_derivative_in_terms_of_the_output(self) -> None:
        """slope(σ(v)) = σ'(v), within [0, 1]."""
        sigma = self.make_activation()
        v = self._points()
        v = v[(v.abs() > 1e-6).all(1)].clamp(-8, 8).requires_grad_()
        (derivative,) = torch.autograd.grad(sigma(v).sum(), v)
        slope = sigma.slope(sigma(v)).expand_as(v).detach()
        _close(slope, derivative, 1e-9, 1e-12, "slope(σ(v))")
        inside = bool(((slope >= 0) & (slope <= 1)).all())
        _require(inside, "slope(z) leaves [0, 1]")

    def test_activation_is_monotone_and_non_expansive(self) -> None:
        """0 ≤ Δσ ≤ Δv on a fine grid from −60 to 60."""
        sigma = self.make_activation()
        wide = torch.linspace(-60, 60, 40001, dtype=_DOUBLE)
        v = torch.cat([wide, 20 + torch.linspace(-1e-6, 1e-6, 2001, dtype=_DOUBLE)])
        v = v.sort().values[:, None].expand(-1, self.units)
        rise, run = sigma(v).diff(dim=0), v.diff(dim=0)
        _require(bool((rise >= 0).all()), f"σ falls by {-float(rise.min()):.1e}")
        above = float((rise - run).max())
        _require(above <= 1e-14, f"σ rises by {above:.1e} more than v")

    def test_slope_bounds_enclose_every_chord(self) -> None:
        """low ≤ (σ(p + t) − σ(p))/t ≤ high for |p − v| ≤ error and |t| ≤ reach."""
        sigma, v, g = self.make_activation(), self._points().clamp(-20, 20), _generator(3)
        reach, error, *shares = torch.rand(5, *v.shape, dtype=_DOUBLE, generator=g)
        reach, error = 3 * reach * v.abs(), 0.1 * error * v.abs()
        low, high = sigma.slope_bounds(v, reach, error)
        ordered = bool(((low >= 0) & (low <= high) & (high <= 1)).all())
        _require(ordered, "slope_bounds do not have 0 ≤ low ≤ high ≤ 1")
        nearest = v - v.sign() * error
        starts = [v, nearest, *(v + (2 * s - 1) * error for s in shares)]
        for p in starts:
            for t in (-reach, reach, -v.sign() * reach, (2 * shares[0] - 1) * reach):
                slope = (sigma(p + t) - sigma(p)) / t
                known = t.abs() > 1e-6
                outside = torch.where(known, torch.maximum(low - slope, slope - high), 0.0)
                _require(float(outside.max()) <= 1e-9, f"a chord is {outside.max():.1e} outside")

    def test_lower_lines_stay_below(self) -> None:
        """σ(p + t) ≥ σ(p) + st − o for every line (s, o), all t and |p − v| ≤ error."""
        sigma, v, g = self.make_activation(), self._points(), _generator(4)
        error, share = torch.rand(2, *v.shape, dtype=_DOUBLE, generator=g)
        error = 0.3 * error * v.abs()
        for slope, offset in sigma.lower_lines(v, error):
            _require(bool((offset >= 0).all()), "an offset of lower_lines is negative")
            for p in (v - error, v + error, v + (2 * share - 1) * error):
                for t in (-p, -2 * p, 5 * v, -5 * v, 1e-3 * v, -200.0 - p, 200.0 - p):
                    above = sigma(p) + slope * t - offset - sigma(p + t)
                    worst = float((above - 1e-12 * (p.abs() + abs(t))).max())
                    _require(worst <= 1e-12, f"the line of slope {slope} is {worst:.1e} above σ")

    def test_values_are_within_their_ulps(self) -> None:
        """σ in float64 differs from that at nearby precision by `ulps` eps; float32 is tried."""
        sigma, x = self.make_activation(), self._points().float()
        try:
            low = sigma(x)
        except RuntimeError:
            return  # an activation with tensors of its own has one dtype
        if low.dtype != torch.float32:
            return
        exact, finfo = sigma(x.double()), torch.finfo(torch.float32)
        allowed = sigma.ulps * finfo.eps * exact.abs() + 2 * finfo.tiny
        excess = float(((low.double() - exact).abs() - allowed).max())
        _require(
            excess <= 0, f"float32 values are off by {excess:.1e} more than ulps = {sigma.ulps}"
        )


def check_activation(activation: ProximalActivation, units: int = 5) -> None:
    """Check the laws of `ActivationLaws` on an activation.

    Args:
        activation: σ, for float64 samples.
        units: of those samples, where σ differs by unit.

    Raises:
        AssertionError: at the first law that fails, with its name.

    Example:
        >>> import solvers
        >>> from solvers.testing import check_activation
        >>> check_activation(solvers.LeakyReLU(0.2))
    """

    class Given(ActivationLaws):
        def make_activation(self) -> ProximalActivation:
            return activation

    laws = Given()
    laws.units = units
    laws.check()


class MethodLaws(Laws):
    """What every `Method` promises.

    Define `make_method`, and `make_problem` for a method that solves problems of one kind only.

    Example:
        >>> import solvers
        >>> from solvers.testing import MethodLaws
        >>> class TestDouglasRachford(MethodLaws):
        ...     def make_method(self):
        ...         return solvers.DouglasRachford()
        >>> TestDouglasRachford().check()
    """

    dtypes: tuple[torch.dtype, ...] = BOTH
    """The types that the laws are tried in."""

    def make_method(self) -> Method:
        """Return the method."""
        raise NotImplementedError(f"{type(self).__name__} must define make_method()")

    def make_problem(self, dtype: torch.dtype, samples: int) -> Inclusion:
        """Return a problem with m ≥ 0.3, whose first samples are those of a smaller one."""
        g, n = _generator(5), 8
        V, N = torch.randn(2, n, n, dtype=_DOUBLE, generator=g) / n**0.5
        metric = torch.rand(n, dtype=_DOUBLE, generator=g) + 0.5
        W = 0.7 * torch.eye(n, dtype=_DOUBLE) - (V.T @ V + N - N.T) / metric[:, None]
        v = torch.randn(max(samples, 16), n, dtype=_DOUBLE, generator=g)[:samples]
        operator = DenseOperator(W.to(dtype), metric.to(dtype))
        return Inclusion(operator, v.to(dtype), ReLU())

    def _solve(
        self, problem: Inclusion, tol: float, max_steps: int = 20000, z0: Tensor | None = None
    ) -> Solution:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SolveWarning)
            return solve(problem, self.make_method(), tol=tol, max_steps=max_steps, z0=z0)

    def test_tolerance_is_reached(self) -> None:
        """‖σ(Wz + v) − z‖_Λ ≤ tol·max(‖σ(Wz + v)‖_Λ, ‖z‖_Λ), evaluated anew, for every sample."""
        for dtype in self.dtypes:
            problem, tol = self.make_problem(dtype, 9), _tolerance(dtype)
            solution = self._solve(problem, tol)
            _require(solution.converged, solution.message())
            _require(
                solution.value.dtype == dtype, f"a {dtype} problem has a {solution.value.dtype} z"
            )
            _check_residual(solution, problem)

    def test_error_bound_holds(self) -> None:
        """‖z − z*‖_Λ ≤ error_bound, for z* found by another method to rounding."""
        for dtype in self.dtypes:
            problem = self.make_problem(dtype, 9)
            solution = self._solve(problem, 1e-3)
            double = problem.to(_DOUBLE)
            exact = solve(double, PeacemanRachford(), tol=1e-14, max_steps=100000).value
            away = double.operator.norm(solution.value.double() - exact)
            bound = solution.error_bound * (1 + 1e-6) + 1e-11
            if double.operator.constants().m > 0:
                _require(bool(bound.isfinite().all()), "the error bound is infinite")
            _require(
                bool((away <= bound).all()), f"z is {float((away / bound).max()):.3g} bounds away"
            )

    def test_a_step_limit_is_observed_and_told(self) -> None:
        """Within max_steps, and converged only where the residual is within tolerance."""
        for dtype in self.dtypes:
            problem, tol = self.make_problem(dtype, 9), _tolerance(dtype)
            for limit in (1, 2, 7):
                solution = self._solve(problem, tol, limit)
                taken = solution.stats.max_steps
                rounds = 2 if dtype == torch.float32 else 1  # the second in float64
                _require(taken <= rounds * limit, f"{taken} steps of {limit} allowed")
                _check_residual(solution, problem)
                if not solution.converged:
                    _require(
                        solution.status in (Status.MAX_STEPS, Status.STALLED, Status.ROUNDING),
                        f"max_steps = {limit} ended as {solution.status}",
                    )

    def test_samples_do_not_depend_on_their_batch(self) -> None:
        """A sample has the same z alone as among others, up to the tolerance."""
        for dtype in self.dtypes:
            tol = _tolerance(dtype)
            problem = self.make_problem(dtype, 5)
            together = self._solve(problem, tol)
            for i in range(5):
                one = Inclusion(problem.operator, problem.bias[i : i + 1], problem.activation)
                alone = self._solve(one, tol)
                norm = problem.to(_DOUBLE).operator.norm
                apart = float(norm((alone.value[0] - together.value[i]).double()[None]))
                allowed = 1e3 * tol * (1 + float(alone.value.abs().max()))
                _require(apart <= allowed, f"sample {i} moves by {apart:.1e} alone")
                _require(alone.converged, alone.message())

    def test_batches_of_every_shape_are_solved(self) -> None:
        """Leading dimensions are samples; none at all is solved at once."""
        for dtype in self.dtypes:
            problem, tol = self.make_problem(dtype, 6), _tolerance(dtype)
            flat = self._solve(problem, tol)
            W, sigma, n = problem.operator, problem.activation, problem.operator.n
            shaped = self._solve(Inclusion(W, problem.bias.reshape(2, 3, n), sigma), tol)
            _require(shaped.value.shape == (2, 3, n), f"z has shape {tuple(shaped.value.shape)}")
            _require(shaped.residual.shape == (2, 3), "the residual has another batch")
            away = float((shaped.value.reshape(6, n) - flat.value).abs().max())
            _require(
                away <= 1e2 * tol * float(1 + flat.value.abs().max()), f"z moves by {away:.1e}"
            )
            empty = self._solve(Inclusion(W, problem.bias[:0], sigma), tol)
            _require(
                empty.converged and empty.value.shape == (0, n), "an empty batch is not solved"
            )

    def test_a_warm_start_is_used(self) -> None:
        """From the solution it takes at most the steps of a cold start, and stays converged."""
        for dtype in self.dtypes:
            problem, tol = self.make_problem(dtype, 9), _tolerance(dtype)
            cold = self._solve(problem, tol)
            warm = self._solve(problem, 2 * tol, z0=cold.value)
            _require(warm.converged, warm.message())
            _check_residual(warm, problem)
            steps = warm.stats.max_steps, cold.stats.max_steps
            _require(steps[0] <= steps[1], f"{steps[0]} steps warm, {steps[1]} cold")

    def test_arguments_are_left_alone(self) -> None:
        """Neither v, nor the tensors of W, nor z0 are written to."""
        for dtype in self.dtypes:
            problem = self.make_problem(dtype, 5)
            z0 = torch.ones_like(problem.bias)
            given = (problem.bias, z0, *problem.operator.tensors)
            before = [t.clone() for t in given]
            self._solve(problem, 1e-3, z0=z0)
            same = all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
            _require(same, "the method writes to its arguments")

    def test_gradients_are_those_of_the_equilibrium(self) -> None:
        """The implicit gradient in v is that of finite differences."""
        if _DOUBLE not in self.dtypes:
            return
        problem = self.make_problem(_DOUBLE, 2)

        def find(v: Tensor) -> Tensor:
            given = Inclusion(problem.operator, v, problem.activation)
            return equilibrium(given, self.make_method(), tol=1e-13, max_steps=100000).value

        _gradcheck(find, (problem.bias.clone().requires_grad_(),))


def check_method(method: Method) -> None:
    """Check the laws of `MethodLaws` on a method that solves dense problems.

    Args:
        method: what is tested.

    Raises:
        AssertionError: at the first law that fails, with its name.

    Example:
        >>> import solvers
        >>> from solvers.testing import check_method
        >>> check_method(solvers.PeacemanRachford())
    """

    class Given(MethodLaws):
        def make_method(self) -> Method:
            return method

    Given().check()


def check_solution(solution: Solution, W: LinearOperator, v: Float[Tensor, "*batch n"]) -> None:
    """Check that a solution of z = max(Wz + v, 0) has converged to within its error bound.

    Args:
        solution: what a solve returned.
        W: the operator.
        v: the bias.

    Raises:
        AssertionError: if it has not.

    Example:
        >>> import torch
        >>> from solvers import DenseOperator, Inclusion, ReLU, solve
        >>> from solvers.testing import check_solution
        >>> W, v = DenseOperator(-torch.eye(2)), torch.ones(3, 2)
        >>> check_solution(solve(Inclusion(W, v, ReLU())), W, v)
    """
    _require(solution.converged, solution.message())
    _check_residual(solution, Inclusion(W, v, ReLU()))
    matrix, metric = written_out(W), W.metric.detach().double()
    dense = Inclusion(DenseOperator(matrix, metric), v.detach().double(), ReLU())
    exact = solve(dense, tol=1e-13, max_steps=50000, require_monotone=False).value
    away = dense.operator.norm(solution.value.detach().double() - exact)
    rounding = 1e-10 if W.dtype == _DOUBLE else 1e-5
    bound = solution.error_bound * (1 + 1e-6) + rounding * (1 + dense.operator.norm(exact))
    _require(bool((away <= bound).all()), f"z is {float((away / bound).max()):.3g} bounds away")


def written_out(W: LinearOperator) -> Float[Tensor, "n n"]:
    """Return W as a float64 matrix, by its products with the unit vectors.

    Example:
        >>> import torch
        >>> from solvers import ZeroOperator
        >>> from solvers.testing import written_out
        >>> written_out(ZeroOperator(torch.ones(2))).tolist()
        [[0.0, 0.0], [0.0, 0.0]]
    """
    return W.mv(torch.eye(W.n, dtype=W.dtype, device=W.device)).T.detach().double()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(W: LinearOperator, *batch: int) -> Tensor:
    """Return normal numbers for an operator, the same at every call."""
    return torch.randn(*batch, W.n, dtype=_DOUBLE, generator=_generator(0)).to(W.metric)


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-10 if dtype == _DOUBLE else 1e-5


def _near(
    actual: Tensor, expected: Tensor, of: LinearOperator | torch.dtype, name: str, scale: float = 1
) -> None:
    """Check closeness at the rounding of an operator's type, relative to the largest number."""
    dtype = of if isinstance(of, torch.dtype) else of.dtype
    expected = expected.detach()
    size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    tolerance = (2e-5 if dtype == torch.float32 else 1e-12) * scale
    _close(actual.detach().double(), expected.double(), tolerance, tolerance * size, name)


def _close(actual: Tensor, expected: Tensor, rtol: float, atol: float, name: str) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def _check_residual(solution: Solution, problem: Inclusion) -> None:
    """Check a solution's residuals against those evaluated anew, in float64."""
    double = problem.to(_DOUBLE)
    true = double.relative_residual(solution.value.detach().double()).reshape(-1)
    told = solution.residual.detach().double().reshape(-1)
    roundoff = 1e-5 if problem.bias.dtype == torch.float32 else 1e-13
    worst = float((true - told).max()) if len(true) else 0.0
    _require(worst <= roundoff, f"a residual is {worst:.1e} above what the solution says")
    if solution.converged and len(told):
        most = float(told.max())
        _require(most <= solution.tol, f"converged with residual {most:.1e} > {solution.tol:.0e}")


def _gradcheck(function: Callable[..., Any], arguments: tuple[Tensor, ...]) -> None:
    try:
        torch.autograd.gradcheck(
            function, arguments, fast_mode=True, nondet_tol=1e-9, atol=1e-5, rtol=1e-3
        )
    except RuntimeError as error:
        raise AssertionError(f"gradients and finite differences differ: {error}") from error


def _fractions(t: Tensor) -> list[list[Fraction]]:
    return [[Fraction(float(x)) for x in row] for row in t.detach().double()]


def _root(x: Fraction) -> float:
    return math.sqrt(float(x))


@contextmanager
def _flushed(flush: bool) -> Iterator[None]:
    """Read and write denormal numbers as zero within the block, where the processor can."""
    torch.set_flush_denormal(flush)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
