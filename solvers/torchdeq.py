"""How do torchdeq's solvers run as methods here, and methods of this package in torchdeq?

`TorchDEQ` is a `Method` that calls a solver of the package torchdeq (Geng and Kolter 2023), version
0.1.0. In the other direction, a `FixedPointMap` is a func for torchdeq, and `torchdeq_solver` turns
a method into a solver for torchdeq:

    import torchdeq
    torchdeq.solver.register_solver("splitting", torchdeq_solver(PeacemanRachford()))
    deq = torchdeq.get_deq(f_solver="splitting", b_solver="anderson", ift=True)
    (z,), info = deq(FixedPointMap(problem, ForwardStep()), torch.zeros_like(problem.bias))

torchdeq is imported on use only, and nothing else of this package imports this file.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from solvers.activations import LinearSlope, ProximalActivation, Step
from solvers.inclusion import Inclusion
from solvers.methods import ForwardBackward, ForwardStep, Method, Outcome, Request, StepSizeRule
from solvers.methods.step_size import choose_step_size
from solvers.solution import OnFailure, SolveError, SolveWarning
from solvers.solve import solve


@dataclass(frozen=True, eq=False)
class FixedPointMap:
    """Map z ↦ prox_{αf}((1 − α)z + α(Wz + v)), and hold the problem it belongs to.

    Its fixed point is the equilibrium for every α. At α = 1 it is z ↦ σ(Wz + v), which need not
    contract. For 0 < α < 2m/L² the map contracts in the Λ norm, and its transposed derivative,
    which torchdeq iterates in its implicit gradient, contracts in the Λ⁻¹ norm.

    It is differentiable in z, v and the tensors that define W; the α of a rule gets no gradient.

    Args:
        problem: the inclusion, with its graph.
        step_size: α > 0, or a rule that computes it from the operator.

    Raises:
        ValueError: if a numerical step size is not positive and finite.

    Example:
        >>> from solvers import DenseOperator, ReLU
        >>> problem = Inclusion(DenseOperator(torch.zeros(2, 2)), torch.ones(1, 2), ReLU())
        >>> FixedPointMap(problem)(torch.zeros(1, 2))
        tensor([[1., 1.]])
    """

    problem: Inclusion
    step_size: float | StepSizeRule = 1.0

    def __post_init__(self) -> None:
        ForwardBackward(step_size=self.step_size)  # checks the step size

    @property
    def alpha(self) -> Step:
        """Return α, one number or one per unit."""
        return choose_step_size(self.step_size, self.problem.operator)

    def __call__(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return the image of z."""
        problem, alpha = self.problem, self.alpha
        moved = problem.operator.affine(z, problem.bias)
        if isinstance(alpha, float) and alpha == 1:
            return problem.activation(moved)
        return _prox(z + alpha * (moved - z), problem.activation, alpha)


def _prox(x: Tensor, activation: ProximalActivation, alpha: Step) -> Tensor:
    """Return prox_{αf}(x), differentiable to any order also where Newton's method computes it."""
    if isinstance(activation, LinearSlope):
        return activation.prox(x, alpha)  # in closed form, and differentiable in its slopes too
    return _Prox.apply(x, activation, alpha)  # type: ignore[no-untyped-call]


class _Prox(torch.autograd.Function):
    """Compute z = prox_{αf}(x), and dz/dx = s / (α + (1 − α)s) with s = σ'(p).

    p solves (1 − α)σ(p) + αp = x, and z = σ(p).
    """

    @staticmethod
    def forward(x: Tensor, activation: ProximalActivation, alpha: Step) -> Tensor:
        return activation.prox(x, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.activation, ctx.alpha = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (z,) = ctx.saved_tensors
        slope = ctx.activation.slope(z)
        return g * slope / (ctx.alpha + (1 - ctx.alpha) * slope), None, None


# The options that each solver of torchdeq reads. It would ignore others in silence, so `TorchDEQ`
# refuses them.
_OPTIONS = {
    "fixed_point_iter": ("tau",),
    "anderson": ("tau", "m", "lam"),
    "broyden": ("ls", "LBFGS_thres"),
}
# Note [Broyden's memory]
# Without LBFGS_thres torchdeq stores every step, and allocates 2 · batch · n · max_iter numbers
# before it starts. With LBFGS_thres, the step after the memory is full overwrites the first
# rank-one term, on which all later terms were built, and the iteration diverges. So broyden runs in
# stretches of _STRETCH evaluations, each with its own memory.
_STRETCH = 200


@dataclass(frozen=True, kw_only=True, repr=False)
class TorchDEQ(Method):
    """Find z by a solver of the package torchdeq on T(z) = prox_{αf}((1 − α)z + α(Wz + v)).

    torchdeq stops if ‖T(z) − z‖₂ / ‖T(z)‖₂ of its worst sample is below a tolerance, and returns
    for each sample the point where it was smallest. The tolerance that it is given is tol · min(1,
    α), because |σ(Wz + v) − z| ≤ |T(z) − z| / min(1, α) unit by unit. A damped iteration, whose
    difference is τ(T(z) − z), is given τ times that. If `tol` in the Λ norm is missed, torchdeq
    starts again from the best points with a smaller tolerance and without its history. One step is
    one evaluation of T for the whole batch; no sample leaves early.
    Reference: Beck (2017), First-Order Methods in Optimization, Theorem 10.9.

    Args:
        solver: torchdeq's name of the solver.
        step_size: α > 0, or a rule that computes it from the operator; 1.0 is z ↦ σ(Wz + v).
        tau: damping of "fixed_point_iter" and "anderson"; torchdeq's default is 1.
        m: memory of "anderson", at least 2; torchdeq's default is 6.
        lam: number that "anderson" adds to the diagonal of its Gram matrix, whose entries have the
            size of ‖T(z) − z‖²₂. If they are far below lam, anderson averages instead of
            accelerating. torchdeq's default is 1e-4.
        ls: whether "broyden" searches along its lines; torchdeq's default is False.
        LBFGS_thres: memory of "broyden". If omitted no step is forgotten, but it starts again from
            the best points every 200 evaluations; see Note [Broyden's memory].

    Raises:
        ValueError: if torchdeq has no such solver, the solver would ignore an option, or an option
            is out of range.
        ImportError: on solving, if torchdeq is not installed.

    Example:
        >>> TorchDEQ(solver="anderson", m=3)
        TorchDEQ(m=3)
        >>> TorchDEQ(solver="broyden", m=3)
        Traceback (most recent call last):
        ValueError: torchdeq's broyden would ignore m; it reads ls, LBFGS_thres
    """

    solver: Literal["fixed_point_iter", "anderson", "broyden"] = "anderson"
    step_size: float | StepSizeRule = ForwardStep()
    tau: float | None = None
    m: int | None = None
    lam: float | None = None
    ls: bool | None = None
    LBFGS_thres: int | None = None

    def __post_init__(self) -> None:
        if self.solver not in _OPTIONS:
            raise ValueError(f"solver must be one of {', '.join(_OPTIONS)}, got {self.solver!r}")
        idle = self._solver_options().keys() - set(_OPTIONS[self.solver])
        if idle:
            raise ValueError(
                f"torchdeq's {self.solver} would ignore {', '.join(sorted(idle))}; "
                f"it reads {', '.join(_OPTIONS[self.solver])}"
            )
        for name, fits in (
            ("tau", self.tau is None or (math.isfinite(self.tau) and self.tau > 0)),
            ("m", self.m is None or self.m >= 2),
            ("lam", self.lam is None or (math.isfinite(self.lam) and self.lam >= 0)),
            ("LBFGS_thres", self.LBFGS_thres is None or self.LBFGS_thres >= 1),
        ):
            if not fits:
                raise ValueError(f"{name} is out of range, got {getattr(self, name)}")
        self._splitting()  # checks the step size

    def _solver_options(self) -> dict[str, Any]:
        names = ("tau", "m", "lam", "ls", "LBFGS_thres")
        return {k: getattr(self, k) for k in names if getattr(self, k) is not None}

    def _splitting(self) -> ForwardBackward:
        return ForwardBackward(step_size=self.step_size)

    def run(self, problem: Inclusion, request: Request) -> Outcome:
        """Run torchdeq's solver until the residual in the Λ norm is met, or cannot be."""
        solver = _import_torchdeq().get_solver(self.solver)
        map_ = FixedPointMap(problem, self.step_size)
        z = torch.zeros_like(problem.bias) if request.z0 is None else request.z0.clone()
        residual = problem.relative_residual(z)
        worst = _maximum(residual)
        tol, floor = self._first_tolerance(map_, request.tol), _FLOOR * torch.finfo(z.dtype).eps
        steps, checks = 0, 1
        while worst > request.tol and steps < request.max_steps:  # NaN ends it too
            tol = max(tol, floor)
            granted = request.max_steps - steps
            if self.solver == "broyden" and self.LBFGS_thres is None:
                granted = min(granted, _STRETCH)
            found, used = self._run_solver(solver, map_, z, tol, granted)
            new = problem.relative_residual(found)
            steps, checks = steps + used, checks + 1
            better = new < residual  # NaN never is
            z, residual = torch.where(better[:, None], found, z), torch.where(better, new, residual)
            worst = _maximum(residual)
            if used < granted and tol > floor:
                tol = _tighten(tol, request.tol, worst)
            elif used < granted or not bool(better.any()):
                break  # it would do the same again
        return Outcome(
            value=z, residual=residual, checks=checks,
            steps=torch.full(z.shape[:1], steps, dtype=torch.long, device=z.device),
        )  # fmt: skip

    def _first_tolerance(self, map_: FixedPointMap, tol: float) -> float:
        damping = self.tau if self.solver == "fixed_point_iter" and self.tau is not None else 1.0
        alpha = map_.alpha
        smallest = alpha if isinstance(alpha, float) else float(alpha.min())
        return tol * damping * min(1.0, smallest)

    def _run_solver(
        self, solver: Callable[..., Any], map_: FixedPointMap, z: Tensor, tol: float, granted: int
    ) -> tuple[Tensor, int]:
        """Run torchdeq's solver once.

        Returns:
            The points that it found, and how often it evaluated the map, at most `granted` times.
        """
        used, last = 0, z

        def evaluate(x: Tensor) -> Tensor:
            nonlocal used, last
            if used == granted:
                raise _EvaluationLimitError
            used, last = used + 1, map_(x)
            return last

        # broyden evaluates once before its first iteration, and more often with a line search;
        # anderson counts the two evaluations before its first, but looks at its third point first.
        max_iter = {"broyden": max(1, granted - 1), "anderson": max(3, granted)}
        try:
            found, _, _ = solver(
                evaluate, z, max_iter=max_iter.get(self.solver, granted), tol=tol, stop_mode="rel",
                **self._solver_options(),
            )  # fmt: skip
        except (_EvaluationLimitError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            found = last  # an evaluation too many, or a singular least-squares problem
        return found, used

    def step_cause(self, problem: Inclusion, m: float, L: float) -> str:
        """Name the step size where the map does not contract."""
        return self._splitting().step_cause(problem, m, L)


class _EvaluationLimitError(Exception):
    """Tell that the solver asked for one evaluation more than it was granted."""


# The smallest tolerance of a relative difference of iterates, in eps: rounding may keep it above.
_FLOOR = 8


def _tighten(tol: float, wanted: float, got: float) -> float:
    """Return a smaller tolerance, after `tol` led to the residual `got` instead of `wanted`."""
    return 0.5 * tol * wanted / max(wanted, got)


def _maximum(numbers: Tensor) -> float:
    return float(numbers.max()) if numbers.numel() else 0.0


TorchDEQSolver = Callable[..., tuple[Tensor, list[Tensor], dict[str, Tensor]]]


def torchdeq_solver(
    method: Method | None = None, *, on_failure: OnFailure = "warn"
) -> TorchDEQSolver:
    """Return a solver for torchdeq that solves the inclusion of its func by `method`.

    func must be a `FixedPointMap`, and z_init a tensor of the shape of its bias. The solver meets
    torchdeq's tolerance of ‖func(z) − z‖₂, which is relative or absolute as stop_mode says: the
    tolerance in the Λ norm is predicted from it, and made smaller if that was not enough. max_iter
    limits the sum of all iterations. The states that torchdeq samples on the way (indexing,
    n_states) are all equal to the solution.

    It cannot be torchdeq's b_solver, which is given a closure without an inclusion. Use one of
    torchdeq's own there, with the contracting map `FixedPointMap(problem, ForwardStep())`, or take
    `solvers.equilibrium`, which has a gradient of its own.

    Args:
        method: how to solve; `Auto()` when omitted.
        on_failure: what to do if a sample misses a tolerance: "warn" or "raise".

    Returns:
        A function for `torchdeq.solver.register_solver`. It raises TypeError if func is no
        `FixedPointMap`, and ValueError if stop_mode is unknown.

    Example:
        >>> from solvers import DenseOperator, PeacemanRachford
        >>> callable(torchdeq_solver(PeacemanRachford()))
        True
    """

    def solver(
        func: Callable[..., Tensor], x0: Tensor, max_iter: int = 50, tol: float = 1e-3,
        stop_mode: str = "abs", indexing: Sequence[int] | None = None,
    ) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:  # fmt: skip
        if stop_mode not in ("abs", "rel"):
            raise ValueError(f'stop_mode must be "abs" or "rel", got {stop_mode!r}')
        map_ = _find_map(func)
        start = _measure(map_, x0)
        inner = tol
        if stop_mode == "abs":  # ‖func(x0)‖ stands for the size of the solution
            size = start["abs_lowest"] / start["rel_lowest"].clamp_min(1e-12)
            inner = min(1.0, tol / max(_maximum(size), 1e-12))
        floor, left, z = _FLOOR * torch.finfo(x0.dtype).eps, max_iter, x0
        steps = torch.zeros_like(start["abs_lowest"], dtype=torch.long)
        while True:
            inner = max(inner, floor)
            solution = solve(
                map_.problem, method, tol=inner, max_steps=left, z0=z, on_failure=on_failure,
                name="forward solve for torchdeq",
            )  # fmt: skip
            z = solution.value
            steps += solution.stats.steps.reshape(len(steps), math.prod(z.shape[1:-1])).amax(-1)
            left -= solution.stats.max_steps
            info = _measure(map_, z)
            worst = _maximum(info[f"{stop_mode}_lowest"])
            if worst <= tol or not solution.converged:
                break  # or `solve` has said so
            if inner <= floor or left < 1:
                _report_missed(stop_mode, worst, tol, solution.message(), on_failure)
                break
            inner = _tighten(inner, tol, worst)
        info["nstep"] = steps
        return z, [z] * len(indexing or ()), info

    return solver


def _find_map(func: Any) -> FixedPointMap:
    """Return the map inside torchdeq's wrapper of a function of one tensor."""
    wrapper = importlib.import_module("torchdeq.utils.layer_utils").DEQWrapper
    inner = func.func if isinstance(func, wrapper) else func
    if isinstance(inner, FixedPointMap):
        return inner
    raise TypeError(
        "this solver needs the inclusion, not only its map: func must be a FixedPointMap(problem) "
        f"and z_init a tensor, not a list; got {type(inner).__name__}. As b_solver take one of "
        'torchdeq\'s own ("anderson", "fixed_point_iter", "broyden")'
    )


def _measure(map_: FixedPointMap, z: Tensor) -> dict[str, Tensor]:
    """Return torchdeq's statistics of the point z."""
    with torch.no_grad():
        rows = z if z.ndim > 1 else z[None]
        return _import_torchdeq().solver_stat_from_final_step(rows, map_(z).reshape(rows.shape))


def _report_missed(mode: str, worst: float, tol: float, text: str, on_failure: OnFailure) -> None:
    message = (
        f"torchdeq's tolerance {tol:.1e} (stop_mode {mode!r}, largest difference now {worst:.1e}) "
        f"is not met, although the {text} Try a larger tolerance, more max_iter or float64."
    )
    if on_failure == "raise":
        raise SolveError(message)
    warnings.warn(message, SolveWarning, stacklevel=3)


def _import_torchdeq() -> Any:
    """Import torchdeq's solvers.

    Raises:
        ImportError: if torchdeq is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences in torchdeq 0.1.0
        try:
            return importlib.import_module("torchdeq.solver")
        except ImportError as error:
            raise ImportError(
                f"solvers.torchdeq runs the package torchdeq, and it cannot be imported ({error}): "
                "pip install torchdeq"
            ) from error
