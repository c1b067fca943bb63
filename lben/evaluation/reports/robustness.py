"""How is what was proved of a network's labels shown on a terminal?"""

from __future__ import annotations

from lben.evaluation.robustness import Robustness
from lben.progress import format_seconds


def robustness_table(report: Robustness) -> str:
    """Return the bound, how it was found, and certified shares by radius.

    Args:
        report: of `lben.evaluation.evaluate_robustness`.

    Example:
        >>> from lben.evaluation import RobustnessConfig
        >>> report = Robustness(
        ...     model="Network", data="digits", samples=40, available=360, clean_accuracy=0.9,
        ...     bound=5.0, method="product", route=None, bound_seconds=0.1, radii=(0.1,),
        ...     certified_globally=(0.5,), certified=(0.75,), largest=(0.1,), local=True,
        ...     seconds_per_sample=0.2, seconds=8.0, config=RobustnessConfig(radii=(0.1,)),
        ...     environment={},
        ... )
        >>> print(robustness_table(report).splitlines()[-2])
        around each input            75.00     0.200
    """
    config = report.config
    among = (
        "" if config.box is None else f", among inputs in [{config.box[0]:g}, {config.box[1]:g}]"
    )
    head = "".join(f"{f'r = {r:.3g}':>12}" for r in report.radii)
    found = report.route or f"bound {report.bound:.6g}, in {report.bound_seconds:.3g} seconds"
    lines = [
        f"{report.model} on {report.data}, first {report.samples} of {report.available} inputs, "
        f"clean accuracy {100 * report.clean_accuracy:.2f} %",
        f"global l2 {found}",
        f"certified % of the exact network at {config.norm} radius r{among}",
        f"{'':22}{head}{'s/input':>10}",
        _row("global bound", report.certified_globally, 0.0),
    ]
    if report.local:
        lines.append(_row("around each input", report.certified, report.seconds_per_sample))
    elif config.local:
        lines.append("this model has no proofs around single inputs")
    lines.append(f"took {format_seconds(report.seconds)}")
    return "\n".join(lines)


def _row(name: str, shares: tuple[float, ...], seconds: float) -> str:
    return f"{name:22}" + "".join(f"{100 * share:12.2f}" for share in shares) + f"{seconds:10.3f}"
