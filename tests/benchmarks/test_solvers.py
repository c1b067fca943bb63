import json
import sys

import pytest
import torch

from benchmarks import peers as peers_module
from benchmarks import solvers as benchmark
from benchmarks.case import Case
from benchmarks.curves import METHODS, convergence_curves, use_memory
from benchmarks.peers import Peers
from benchmarks.problems import DIFFICULTIES, random_problem
from benchmarks.published import DenseInverse, Published, search
from lben import cli
from solvers import Inclusion, LinearSlope, PeacemanRachford, solve


@pytest.mark.parametrize(("m", "skew"), DIFFICULTIES)
def test_random_problems_are_as_hard_as_they_say(m, skew):
    inclusion = random_problem(30, 4, m, skew).inclusion(torch.float64)
    constants = inclusion.operator.constants()
    assert m - 1e-9 <= constants.m <= m + 0.1
    assert skew - 1e-9 <= constants.L <= skew + m + 4.5


def test_the_published_loop_finds_the_same_solution_and_adjoint():
    inclusion = random_problem(30, 16, 0.1, 10.0).inclusion(torch.float64)
    solution = solve(inclusion, tol=1e-12)
    slope = LinearSlope(inclusion.activation.slope(solution.value))
    adjoint = Inclusion(inclusion.operator.T, torch.randn(16, 30, dtype=torch.float64), slope)
    loop = search(inclusion, adjoint, 1e-9, 5000)
    assert loop.forward_steps is not None
    assert loop.backward_steps is not None
    inverse = DenseInverse.of(inclusion.operator.tensors[0], loop.alpha)
    z = loop.forward(inclusion, inverse)
    assert (inclusion.relative_residual(z) <= 1e-9).all()
    assert (adjoint.relative_residual(loop.backward(adjoint, inverse)) <= 1e-9).all()
    # The oracle stops at the first iteration that suffices.
    earlier = Published(alpha=loop.alpha, forward_steps=loop.forward_steps - 1, backward_steps=None)
    assert (inclusion.relative_residual(earlier.forward(inclusion, inverse)) > 1e-9).any()


@pytest.mark.slow
def test_a_plan_fills_every_cell_and_the_figures(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "ROUNDS", 2)
    monkeypatch.setattr(peers_module, "PATIENCE", 1e6)
    plan = benchmark.Plan(
        sizes=(24,),
        batches=(128, 9),
        tolerances=((torch.float32, 1e-3), (torch.float64, 1e-8)),
        threads=(1,),
        trained=(),
        peer_sizes=(24,),
    )
    record = benchmark.Record()
    for problem in benchmark.problems(plan, "nowhere"):
        for dtype, tol in plan.tolerances:
            benchmark.measure(record, Case(problem, dtype, tol), plan)
    figures = record.figures()
    assert figures["failures"] == 0
    assert figures["bound_violations"] == 0
    assert figures["worst_ratio_torchdeq"] > 0
    assert figures["geomean_forward_ratio_published"] > 0
    assert figures["geomean_backward_ratio_published"] > 0
    assert figures["floor_ratio"].keys() == {"24"}
    # 3 difficulties × 2 tolerances × (4 directions at batch 128, 3 at batch 9)
    assert len(record.cells) == 3 * 2 * 7
    easy = [c for c in record.cells if c["m"] == 1.0 and c["direction"] == "forward"]
    assert {r["method"] for c in easy for r in c["results"]} == {"lben", "published", "torchdeq"}
    assert all(r["seconds"] for c in easy if c["batch"] == 128 for r in c["results"])
    json.dumps(record.cells)
    assert len(capsys.readouterr().out.splitlines()) == len(record.cells)


def test_a_failing_solver_is_counted_and_shown(monkeypatch, capsys):
    case = Case(random_problem(20, 9, 0.01, 100.0), torch.float64, 1e-8)
    monkeypatch.setattr(peers_module, "Auto", lambda: PeacemanRachford(step_size=1e9))
    record = benchmark.Record()
    peers = Peers(torchdeq=None, torchdeq_both=None, published=None, with_torchdeq=False)
    benchmark.cell(record, case, 1, "forward+backward", 1e-6, peers)
    assert record.failures == 1
    assert record.cells[0]["results"][0]["seconds"] is None
    assert "SolveError" in record.cells[0]["results"][0]["status"]


def test_a_bound_below_the_error_is_counted():
    case = Case(random_problem(20, 9, 1.0, 1.0), torch.float32, 1e-3)
    assert case.violations() == 0
    honest = case.solution.error_bound
    case.solution.__dict__["error_bound"] = torch.zeros_like(honest)
    assert case.violations() == 9


def test_memory_does_not_grow_with_the_steps():
    assert use_memory(50) < 4.0


def test_the_command_line_runs_it_or_says_what_is_missing(monkeypatch, capsys):
    words = []
    monkeypatch.setattr(benchmark, "main", words.extend)
    assert cli.main(["bench", "--quick", "--out", "f.json"]) == 0
    assert words == ["--quick", "--out", "f.json"]
    monkeypatch.setitem(sys.modules, "benchmarks.solvers", None)
    assert cli.main(["bench"]) == 1
    assert "come with the source tree" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quick_run_ends_with_one_line_of_figures(monkeypatch, capsys, tmp_path):
    def no_mnist(root, batches):
        return iter([random_problem(20, batches[-1], 1.0, 1.0)])

    for module in ("solvers", "curves"):
        monkeypatch.setattr(f"benchmarks.{module}.trained_problems", no_mnist)
    monkeypatch.setattr(benchmark, "find_root", lambda root: "")
    out, page = tmp_path / "solvers.json", tmp_path / "solvers.html"
    benchmark.main(["--quick", "--out", str(out), "--html", str(page)])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures.keys() == {
        "failures",
        "bound_violations",
        "worst_ratio_torchdeq",
        "geomean_forward_ratio_published",
        "geomean_backward_ratio_published",
        "floor_ratio",
    }
    assert figures["floor_ratio"].keys() >= {"80", "400", "1000"}
    assert figures["failures"] == figures["bound_violations"] == 0
    assert json.loads(out.read_text())["figures"] == figures
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_curves_hold_every_method(monkeypatch):
    monkeypatch.setattr("benchmarks.curves.trained_problems", lambda root, batches: iter(()))
    curves = convergence_curves("", quick=True)
    assert len(curves) == 2 * len(METHODS)
    best = min(c["residual"][-1] for c in curves if c["method"] == "PeacemanRachford()")
    assert best < 1e-12
