"""How is the gap between certified and attacked accuracy drawn?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lben.evaluation.accuracy import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def canvas() -> tuple[Figure, Axes]:
    """Return an empty figure and its axes.

    Raises:
        ImportError: if matplotlib is not installed (`pip install lben[plots]`).
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'lben[plots]'") from error

    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def draw(report: Report, path: Path) -> None:
    """Write a PNG of certified and attacked accuracy over the radius.

    Args:
        report: of `lben.evaluation.evaluate`.
        path: of the file.

    Raises:
        ImportError: if matplotlib is not installed (`pip install lben[plots]`).

    Example:
        >>> import tempfile
        >>> from lben.evaluation import EvaluationConfig
        >>> report = Report(
        ...     data="digits", samples=360, attack_samples=20, radii=(0.0, 0.5), clean_accuracy=0.9,
        ...     certified_accuracy=(0.9, 0.4), certified_exact=(0.9, 0.4),
        ...     certified_attacked=(0.9, 0.5), pgd_accuracy=(0.9, 0.7), gamma=2.0, bound=5.0,
        ...     promised_bound=5.5, quotient=4.0, tightness=1.375, pairs=205, violations=0,
        ...     smallest_eigenvalue=0.01, m=0.5, dtype="float32", tol=1e-4, max_logit_error=2e-4,
        ...     solver_steps=17, seconds=3.0, config=EvaluationConfig(), environment={},
        ... )
        >>> path = Path(tempfile.mkdtemp()) / "robustness.png"
        >>> draw(report, path)
        >>> path.exists()
        True
    """
    figure, axes = canvas()
    certified = [100 * a for a in report.certified_attacked]
    attacked = [100 * a for a in report.pgd_accuracy]
    axes.fill_between(report.radii, certified, attacked, color="0.9", label="undecided")
    axes.plot(report.radii, attacked, marker="o", color="C3", label="withstands PGD")
    axes.plot(report.radii, certified, marker="s", color="C0", label="certified")
    axes.set_xlabel("ℓ2 radius (pixels on [0, 1])")
    axes.set_ylabel(f"accuracy, % of {report.attack_samples} test images")
    axes.set_ylim(0, 100)
    axes.set_xlim(0, max(report.radii) or None)
    bound = "no promised bound" if report.gamma is None else f"γ = {report.gamma:g}"
    axes.set_title(
        f"{report.data}: {bound}, clean accuracy {100 * report.clean_accuracy:.1f} %", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)
