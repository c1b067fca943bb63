"""How does an evaluation read on a terminal?"""

from __future__ import annotations

from lben.evaluation.accuracy import Report
from lben.models import Promise


def table(report: Report) -> str:
    """Return the report as lines of at most 90 columns.

    Args:
        report: of `lben.evaluation.evaluate`.

    Example:
        >>> from lben.evaluation import EvaluationConfig
        >>> report = Report(
        ...     data="digits", samples=360, attack_samples=20, radii=(0.5,), clean_accuracy=0.9,
        ...     certified_accuracy=(0.4,), certified_exact=(0.4,), certified_attacked=(0.5,),
        ...     pgd_accuracy=(0.7,), gamma=2.0, bound=5.0, promised_bound=5.5, quotient=4.0,
        ...     tightness=1.375, pairs=205, violations=0, smallest_eigenvalue=0.01, m=0.5,
        ...     dtype="float32", tol=1e-4, max_logit_error=2e-4, solver_steps=17, seconds=3.0,
        ...     config=EvaluationConfig(radii=(0.5,)), environment={},
        ... )
        >>> print(table(report).splitlines()[3])
        proved bound       5 (pixels to logits)
    """
    promised = "none" if report.gamma is None else f"{report.gamma:g} on the normalised input"
    lines = [
        f"data               {report.data}, {report.samples} test images",
        f"clean accuracy     {100 * report.clean_accuracy:.2f} %",
        f"promised γ         {promised}",
        f"proved bound       {report.bound:.4g} (pixels to logits)",
        f"largest quotient   {report.quotient:.4g} found; tightness {report.tightness:.3f}"
        + (
            "" if report.promised_bound is None else f" (bound {report.promised_bound:.4g} ÷ found)"
        ),
        f"violations         {report.violations} in {report.pairs} pairs and all PGD attacks",
        f"solver             {report.solver_steps} steps at most, logits proved within "
        f"{report.max_logit_error:.1e}",
        f"certified          {statement(report.dtype, report.tol)};",
        "                   exact: the same of the network of these weights, solved exactly",
        "",
        f"l2 radius   certified %   exact %   certified %     PGD %   (last two on the first "
        f"{report.attack_samples})",
    ]
    rows = zip(
        report.radii,
        report.certified_accuracy,
        report.certified_exact,
        report.certified_attacked,
        report.pgd_accuracy,
        strict=True,
    )
    for radius, certified, exact, subset, attacked in rows:
        lines.append(
            f"{radius:9.3f}   {100 * certified:11.2f}   {100 * exact:7.2f}   "
            f"{100 * subset:11.2f}   {100 * attacked:7.2f}"
        )
    return "\n".join(lines)


def statement(dtype: str, tol: float | None, promise: Promise = "running") -> str:
    """Return in words what the certified radii of a report promise.

    Args:
        dtype: that the network runs in.
        tol: relative tolerance of its solver; None without a solver.
        promise: see `Promise`.

    Example:
        >>> print(statement("float32", 1e-4))
        as it runs (float32, solves to 0.0001) it keeps the label in the ball
    """
    if promise == "exact":
        return "the exact network of these weights keeps the label in the ball"
    solved = "" if tol is None else f", solves to {tol:g}"
    return f"as it runs ({dtype}{solved}) it keeps the label in the ball"
