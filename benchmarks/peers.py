"""Who are the peers of one case, at their best?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from benchmarks.case import Case, quietly
from benchmarks.common import interleaved
from benchmarks.published import DenseInverse, Published, search
from solvers import Auto, Inclusion, solve
from solvers.torchdeq import TorchDEQ

PATIENCE = 30.0
"""How many times lben's time torchdeq may take on 128 samples; who takes longer is not timed."""
_EVALUATIONS = 4.0  # an evaluation costs more than a product, so more of them take 4 times the time
_SOLVERS: tuple[Literal["fixed_point_iter", "anderson", "broyden"], ...] = (
    "fixed_point_iter", "anderson", "broyden",
)  # fmt: skip
_STEPS = (1.0, 0.5, 0.25, 0.1, 0.03)


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """A solver of torchdeq that reached the tolerance.

    Attributes:
        method: the solver.
        seconds: its time on 128 samples.
        limit: four times the evaluations that it needed there, its limit elsewhere.
    """

    method: TorchDEQ
    seconds: float
    limit: int

    def solves(self, problem: Inclusion, tol: float) -> bool:
        """Say whether it solves another problem within its limit."""
        attempt = partial(
            solve, problem, self.method, tol=tol, max_steps=self.limit, require_monotone=False
        )
        return quietly(attempt).converged


_known: dict[tuple[str, torch.dtype, float], list[Arrived]] = {}


def torchdeq_peers(case: Case) -> list[Arrived]:
    """Return the solvers of the grid that arrive in time on 128 samples, the fastest first.

    Found once for all batches of a layer.
    """
    key = (case.problem.layer, case.dtype, case.tol)
    if key not in _known:
        _known[key] = _search(case)
    return _known[key]


def _search(case: Case) -> list[Arrived]:
    small = case.forward.select(torch.arange(min(128, case.forward.bias.shape[0])))
    own = partial(quietly, partial(solve, small, tol=case.tol))
    ours = statistics.median(interleaved({"lben": own}, 5)["lben"])
    x, W = small.bias, case.forward.operator.tensors[0]
    product = statistics.median(interleaved({"": lambda: torch.mm(x, W)}, 5)[""])
    most = max(30, int(_EVALUATIONS * ours / product))
    arrived = []
    for name in _SOLVERS:
        for alpha in _STEPS:
            peer = TorchDEQ(solver=name, step_size=alpha)
            attempt = partial(
                solve, small, peer, tol=case.tol, max_steps=most, require_monotone=False
            )
            start = time.perf_counter()
            solution = quietly(attempt)
            seconds = time.perf_counter() - start
            if solution.converged and seconds < PATIENCE * ours:
                limit = 4 * solution.stats.max_steps
                arrived.append(Arrived(method=peer, seconds=seconds, limit=limit))
    return sorted(arrived, key=lambda peer: peer.seconds)


@dataclass(frozen=True, kw_only=True)
class Peers:
    """Whom lben is compared with on one case.

    Attributes:
        torchdeq: the fastest solver of the grid; None when none arrives in time.
        torchdeq_both: the fastest that solves the adjoint problem too.
        published: the published loop, or None where it does not take part.
        with_torchdeq: whether torchdeq takes part.
    """

    torchdeq: Arrived | None
    torchdeq_both: Arrived | None
    published: Published | None
    with_torchdeq: bool

    @staticmethod
    def of(case: Case, *, with_torchdeq: bool) -> Peers:
        """Search the peers' best configurations for a case; the published loop at batch 128."""
        arrived = torchdeq_peers(case) if with_torchdeq else []
        both = (peer for peer in arrived if peer.solves(case.adjoint, case.tol))
        loop = case.problem.batch == 128
        return Peers(
            torchdeq=next(iter(arrived), None),
            torchdeq_both=next(both, None),
            published=search(case.forward, case.adjoint, case.tol, 3000) if loop else None,
            with_torchdeq=with_torchdeq,
        )

    def torchdeq_in(self, direction: str) -> Arrived | None:
        """Return torchdeq's solver for a direction."""
        return self.torchdeq if direction == "forward" else self.torchdeq_both

    def runs(self, case: Case, direction: str) -> dict[str, Callable[[], Any]]:
        """Return the calls of all who take part in this direction and arrive."""
        runs: dict[str, Callable[[], Any]] = {}
        forward, adjoint, loop = case.forward, case.adjoint, self.published
        peer = self.torchdeq_in(direction)
        new_weights = direction == "new weights"
        match direction:
            case "forward":
                runs["lben"] = lambda: solve(forward, tol=case.tol)
            case "backward":
                method = case.adjoint_method
                runs["lben"] = lambda: solve(adjoint, method, tol=case.tol)
            case _:
                runs["lben"] = lambda: case.gradients(Auto(), new_weights=new_weights)
        if loop is not None and loop.forward_steps is not None:
            inverse = DenseInverse.of(forward.operator.tensors[0], loop.alpha)
            if direction == "forward":
                runs["published"] = lambda: loop.forward(forward, inverse)
            elif direction == "backward" and loop.backward_steps is not None:
                runs["published"] = lambda: loop.backward(adjoint, inverse)
        if peer is not None and direction == "forward":
            runs["torchdeq"] = lambda: solve(
                forward, peer.method, tol=case.tol, max_steps=peer.limit, on_failure="raise",
                require_monotone=False,
            )  # fmt: skip
        elif peer is not None and direction != "backward":
            runs["torchdeq"] = lambda: case.gradients(
                peer.method, new_weights=new_weights, max_steps=peer.limit
            )
        return runs
