"""How is a comparison of proofs shown, as a table and as a picture?"""

from __future__ import annotations

from pathlib import Path

from lben.evaluation.proofs import Certification
from lben.evaluation.reports.picture import canvas
from lben.evaluation.reports.table import statement
from lben.progress import format_seconds


def certification_table(report: Certification) -> str:
    """Return certified accuracy by method and radius, what each costs, and what attacks leave.

    Args:
        report: of `lben.evaluation.evaluate_certificates`.

    Example:
        >>> from lben.evaluation import CertificationConfig
        >>> report = Certification(
        ...     data="digits", samples=40, available=360, radii=(0.1,), clean_accuracy=0.9,
        ...     dtype="float32", tol=1e-4, methods=(), attacked=(0.8,), violations=0, in_linf=(),
        ...     seconds=21.0, config=CertificationConfig(radii=(0.1,)), environment={},
        ... )
        >>> print(certification_table(report).splitlines()[3])
        withstands the attacks              80.00
    """
    head = "".join(f"{f'r = {r:g}':>10}" for r in report.radii)
    lines = [
        f"{report.data}, first {report.samples} of {report.available} test images, clean accuracy "
        f"{100 * report.clean_accuracy:.2f} %; certified % at l2 radius r in pixels",
        statement(report.dtype, report.tol, report.config.promise),
        f"{'':22}{'bound':>9}{head}{'proof s':>10}{'ms/image':>10}",
    ]

    def row(name: str, bound: str, shares: tuple[float, ...], cost: str) -> str:
        return f"{name:22}{bound:>9}" + "".join(f"{100 * s:10.2f}" for s in shares) + cost

    for method in report.methods:
        cost = f"{method.seconds:10.3f}{1e3 * method.seconds_per_image:10.2f}"
        lines.append(row(method.name, f"{method.bound:.4g}", method.certified, cost))
    lines.append(row("withstands the attacks", "", report.attacked, ""))
    lines.append(f"violations: {report.violations}")
    head = "".join(f"{f'{255 * r:.3g}/255':>10}" for r in report.config.linf_radii)
    lines.append("certified % where no pixel changes by more than")
    lines.append(f"{'':22}{'bound':>9}{head}{'proof s':>10}")
    for method in report.in_linf:
        cost = f"{method.seconds:10.3f}"
        lines.append(row(method.name, f"{method.bound:.4g}", method.certified, cost))
    lines.append(f"took {format_seconds(report.seconds)}{_rest(report)}")
    return "\n".join(lines)


def _rest(report: Certification) -> str:
    """Say how long a run on all test images takes; empty text if this run has them all."""
    if report.samples == report.available:
        return ", all test images"
    return (
        f"; all test images: --samples {report.available} takes about "
        f"{format_seconds(report.seconds_of_all)}"
    )


def draw_certification(report: Certification, path: Path) -> None:
    """Write a PNG of certified accuracy by method, the gap up to the attacks shaded.

    Args:
        report: of `lben.evaluation.evaluate_certificates`.
        path: of the file.

    Raises:
        ImportError: if matplotlib is not installed (`pip install lben[plots]`).

    Example:
        >>> import tempfile
        >>> from lben.evaluation import CertificationConfig, Method
        >>> proof = Method(
        ...     name="scaled", bound=5.0, certified=(0.4,), seconds=0.5, seconds_per_image=0.002
        ... )
        >>> report = Certification(
        ...     data="digits", samples=40, available=360, radii=(0.1,), clean_accuracy=0.9,
        ...     dtype="float32", tol=1e-4, methods=(proof,), attacked=(0.8,), violations=0,
        ...     in_linf=(), seconds=21.0, config=CertificationConfig(radii=(0.1,)), environment={},
        ... )
        >>> path = Path(tempfile.mkdtemp()) / "certification.png"
        >>> draw_certification(report, path)
        >>> path.exists()
        True
    """
    figure, axes = canvas()
    radii = (0.0, *report.radii)

    def curve(shares: tuple[float, ...]) -> list[float]:
        return [100 * report.clean_accuracy, *(100 * s for s in shares)]

    best, attacked = curve(report.best), curve(report.attacked)
    axes.fill_between(radii, best, attacked, color="0.9", label="undecided")
    axes.plot(radii, attacked, marker="o", color="C3", label="withstands the attacks")
    for index, method in enumerate(report.sound):
        axes.plot(radii, curve(method.certified), marker="s", ms=3, color=f"C{index + 4}",
                  label=method.name)  # fmt: skip
    axes.set_xlabel("ℓ2 radius (pixels on [0, 1])")
    axes.set_ylabel(f"accuracy, % of {report.samples} test images")
    axes.set_ylim(0, 100)
    axes.set_xlim(0, max(radii))
    axes.set_title(f"{report.data}: certified by each proof", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
