"""How fast and how reliable are the solvers, against torchdeq's and the published loop?

    python -m benchmarks.solvers [--quick] [--root FOLDER] [--out FILE] [--html FILE]

Every cell is one problem, tolerance, number of threads and direction:

- forward: weights as they were, factors kept; lben's `Auto()`, the published Peaceman–Rachford loop
  (`benchmarks.published`, batch 128) and the torchdeq solver that is fastest of a grid;
- backward: the adjoint problem alone, factors kept; lben and the published loop (batch 128);
- forward+backward: the same factors, gradients of W and v; lben and torchdeq;
- new weights: the same after a change of W, with everything factored anew;
- every method, forward and every method, adjoint: all methods of the package and torchdeq's three
  solvers on three problems, tolerances 1e-3 to 1e-10, at most 1000 steps each.

Times are medians of rounds in which all methods take turns. A ratio is the median over rounds of
the other's time by lben's. A torchdeq solver is given as many evaluations as there are products in
4 times lben's time; one that takes more than 30 times lben's time on 128 samples is not timed, and
one that takes more than 0.3 s and 20 times lben's time in a cell is timed once and not part of the
figures. Errors are measured against a float64 reference.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.common import circumstances, find_root, interleaved, parser, ratio, write
from benchmarks.curves import (
    convergence_curves,
    every_method,
    gradient_bias,
    peak_memory,
    scaling,
    warm_starts,
)  # fmt: skip
from benchmarks.peers import PATIENCE, Peers
from benchmarks.problems import SEED, Problem, random_problems, trained_problems
from benchmarks.report import render
from lben.data import DataError
from solvers import SolveError

TOLERANCES = ((torch.float32, 1e-3), (torch.float32, 1e-5), (torch.float64, 1e-8))
ROUNDS = 7
DIRECTIONS = ("forward", "backward", "forward+backward", "new weights")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        sizes, batches: of the random families.
        tolerances: (dtype, tol).
        threads: numbers of threads.
        trained: batches of the trained layers.
        peer_sizes: sizes at which torchdeq takes part.
        hardest: how many of the difficulties, from the easiest; m and the skew part grow hard
            together.
    """

    sizes: tuple[int, ...] = (80, 250, 400, 1000)
    batches: tuple[int, ...] = (128, 1024)
    tolerances: tuple[tuple[torch.dtype, float], ...] = TOLERANCES
    threads: tuple[int, ...] = (2, 1)
    trained: tuple[int, ...] = (128, 1024)
    peer_sizes: tuple[int, ...] = (80, 250, 400, 1000)
    hardest: int = 3


QUICK = Plan(
    sizes=(80, 400, 1000), batches=(128,), tolerances=TOLERANCES[:1], threads=(2,), trained=(128,),
    peer_sizes=(80,), hardest=2,
)  # fmt: skip


@dataclass
class Record:
    """All that was measured so far."""

    cells: list[dict[str, Any]] = field(default_factory=list)
    failures: int = 0
    bound_violations: int = 0
    torchdeq: list[float] = field(default_factory=list)
    torchdeq_new: list[float] = field(default_factory=list)
    published: dict[str, list[float]] = field(
        default_factory=lambda: {"forward": [], "backward": []}
    )
    published_large: dict[str, list[float]] = field(
        default_factory=lambda: {"forward": [], "backward": []}
    )
    floor: dict[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Return the figures of the last line."""
        return {
            "failures": self.failures,
            "bound_violations": self.bound_violations,
            "worst_ratio_torchdeq": _round(min(self.torchdeq, default=None)),
            "geomean_forward_ratio_published": _round(_geomean(self.published["forward"])),
            "geomean_backward_ratio_published": _round(_geomean(self.published["backward"])),
            "floor_ratio": {n: _round(worst) for n, worst in self.floor.items()},
        }


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark with the command line's words, or with those given."""
    options = parser("solvers against torchdeq's and the published loop")
    options.add_argument("--root", help="folder that holds MNIST/raw")
    options.add_argument("--html", type=Path, help="also write the report to this file")
    arguments = options.parse_args(words)
    plan = QUICK if arguments.quick else Plan()
    try:
        root = find_root(arguments.root)
    except DataError as error:
        options.error(str(error))
    torch.manual_seed(SEED)
    record = Record()
    started = time.perf_counter()
    threads = torch.get_num_threads()
    print(HEADER)
    for problem in problems(plan, root):
        for dtype, tol in plan.tolerances:
            measure(record, Case(problem, dtype, tol), plan)
    torch.set_num_threads(threads)
    details: dict[str, Any] = {
        "title": "Equilibrium solvers",
        "seed": SEED,
        "quick": arguments.quick,
        "curves": convergence_curves(root, quick=arguments.quick),
        "scaling": scaling(quick=arguments.quick),
        "gradients": gradient_bias(root),
        "memory": peak_memory(),
        "warm_starts": warm_starts(root),
        "published_n_above_250": {
            direction: _round(_geomean(ratios))
            for direction, ratios in record.published_large.items()
        },
        "torchdeq_new_weights": _round(min(record.torchdeq_new, default=None)),
        "seconds": round(time.perf_counter() - started, 1),
        "cells": [*record.cells, *every_method(root, quick=arguments.quick)],
    }
    report(details, record)
    whole = {**details, "figures": record.figures(), **circumstances()}
    if arguments.out is not None:
        write(arguments.out, whole)
    if arguments.html is not None:
        arguments.html.parent.mkdir(parents=True, exist_ok=True)
        arguments.html.write_text(render(whole))
    print(json.dumps(record.figures()))


def problems(plan: Plan, root: str) -> Iterator[Problem]:
    """Yield the problems of the plan."""
    if plan.trained:
        yield from trained_problems(root, plan.trained)
    yield from random_problems(plan.sizes, plan.batches, plan.hardest)


HEADER = (
    f"{'problem':34} {'dtype':7} {'tol':>6} {'thr':>3} {'direction':16} {'lben ms':>9} "
    f"{'steps':>6} {'÷ floor':>7} {'published':>9} {'torchdeq':>9}"
)


def measure(record: Record, case: Case, plan: Plan) -> None:
    """Measure all cells of a case, for every number of threads."""
    problem = case.problem
    torch.set_num_threads(max(plan.threads))
    record.bound_violations += case.violations()
    with_torchdeq = problem.n in plan.peer_sizes or problem.family == "trained"
    peers = Peers.of(case, with_torchdeq=with_torchdeq)
    for threads in plan.threads:
        torch.set_num_threads(threads)
        product = product_seconds(case)
        for direction in DIRECTIONS:
            if direction == "backward" and peers.published is None:
                continue
            cell(record, case, threads, direction, product, peers)


def cell(
    record: Record, case: Case, threads: int, direction: str, product: float, peers: Peers
) -> None:
    """Time the methods of a cell, print its line and keep it."""
    problem = case.problem
    try:
        runs = peers.runs(case, direction)
        solution = runs["lben"]()
    except SolveError as error:
        record.failures += 1
        record.cells.append(case.cell(threads, direction, product, [_failed("lben", error)]))
        print(f"{problem.name:34} {direction}: {error}")
        return
    once = slow(runs)
    for name in once:
        del runs[name]
    seconds = interleaved(runs, ROUNDS, warmup=1)
    record.failures += not solution.converged
    times = {name: statistics.median(values) for name, values in seconds.items()}
    steps = float(solution.stats.steps.double().mean())
    floor = times["lben"] / (steps * product)
    ratios = {name: ratio(seconds, name, "lben") for name in runs if name != "lben"}
    if direction == "forward":
        key = str(problem.n)
        record.floor[key] = max(record.floor.get(key, 0.0), floor)
    if "torchdeq" in ratios:
        where = record.torchdeq_new if direction == "new weights" else record.torchdeq
        where.append(ratios["torchdeq"])
    if "published" in ratios:
        loops = record.published if problem.n <= 250 else record.published_large
        loops[direction].append(ratios["published"])
    results = [
        {
            "method": "lben", "seconds": times["lben"] if solution.converged else None,
            "steps": solution.stats.max_steps, "mean_steps": steps,
            "status": solution.status.value, "residual": float(solution.residual.max()),
            "detail": solution.method,
        }
    ]  # fmt: skip
    loop, peer = peers.published, peers.torchdeq_in(direction)
    if loop is not None and direction in ("forward", "backward"):
        done = loop.forward_steps if direction == "forward" else loop.backward_steps
        results.append({
            "method": "published", "seconds": times.get("published"), "steps": done,
            "status": "stopped by the oracle" if done else "did not arrive in 3000 iterations",
            "residual": None, "detail": f"α = {loop.alpha:g}",
        })  # fmt: skip
    if direction != "backward" and peers.with_torchdeq:
        results.append({
            "method": "torchdeq", "seconds": {**once, **times}.get("torchdeq"), "steps": None,
            "status": "reached its tolerance" if "torchdeq" in times else
            "reached its tolerance (timed once)" if once.get("torchdeq") else
            f"no solver of the grid arrived within {PATIENCE:g} times lben's time",
            "residual": None, "detail": repr(peer.method) if peer is not None else "",
        })  # fmt: skip
    record.cells.append(case.cell(threads, direction, product, results))
    shown_floor = f"{floor:.2f}" if direction == "forward" else ""
    shown = {name: f"{value:.1f} ×" for name, value in ratios.items()}
    shown |= {name: f"~{value / times['lben']:.0f} ×" for name, value in once.items() if value}
    print(
        f"{problem.name:34} {str(case.dtype)[6:]:7} {case.tol:6.0e} {threads:3} {direction:16} "
        f"{1e3 * times['lben']:9.3f} {steps:6.1f} {shown_floor:>7} "
        f"{shown.get('published', '–'):>9} {shown.get('torchdeq', '–'):>9}"
        + ("" if solution.converged else f"  {solution.status.value}"),
        flush=True,
    )


def slow(runs: Mapping[str, Callable[[], Any]]) -> dict[str, float | None]:
    """Return the times of who takes more than 0.3 s and 20 times lben's, and None for who fails."""
    once: dict[str, float | None] = {}
    if "torchdeq" in runs:
        try:
            once["torchdeq"] = timed(runs["torchdeq"])
        except SolveError:
            return {"torchdeq": None}
    limit = max(0.3, 20 * timed(runs["lben"]))
    return {name: seconds for name, seconds in once.items() if seconds and seconds > limit}


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _failed(method: str, error: Exception) -> dict[str, Any]:
    return {
        "method": method, "seconds": None, "steps": None, "status": type(error).__name__,
        "residual": None, "detail": str(error),
    }  # fmt: skip


def product_seconds(case: Case) -> float:
    """Return the median time of the bare product of the batch with an n × n matrix."""
    x, W = case.forward.bias, case.forward.operator.tensors[0].T.contiguous()
    out = torch.empty_like(x)
    times = interleaved({"product": lambda: torch.mm(x, W, out=out)}, 21)["product"]
    return statistics.median(times)


def report(details: Mapping[str, Any], record: Record) -> None:
    """Print what is not in the table."""
    scale, memory = details["scaling"], details["memory"]
    print(
        f"\ncost ~ n^{scale['slope_n']:.2f} at batch 128, ~ batch^{scale['slope_batch']:.2f} at "
        "n = 250 (fixed 50 steps)"
    )
    print(
        "peak memory of forward and backward above that of one step: "
        f"{memory['short']:.1f} MiB at 10 steps, {memory['long']:.1f} MiB at 1000"
    )
    print("relative error (and cosine) of the gradient of W, exact one against:")
    for row in details["gradients"]:
        print(f"  {row['layer']:10} {row['gradient']:40} {row['error']:9.2g} ({row['cosine']:.3f})")
    print("warm starts after the bias moved, cold time by warm time (steps):")
    for row in details["warm_starts"]:
        print(
            f"  {row['problem']:34} moved by {row['moved']:.0e}: {row['ratio']:.1f} × "
            f"({row['cold_steps']:.1f} → {row['warm_steps']:.1f})"
        )
    new = details["torchdeq_new_weights"]
    print(f"torchdeq with new weights at every call, worst cell: {new} ×")
    large = details["published_n_above_250"]
    print(
        f"published loop at n > 250, batch 128: forward {large['forward']} ×, "
        f"backward {large['backward']} ×"
    )
    print(f"{len(record.cells)} cells in {details['seconds']} s\n")


def _geomean(values: list[float]) -> float | None:
    return statistics.geometric_mean(values) if values else None


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


if __name__ == "__main__":
    main()
