"""How does a record of the solver benchmark read in a browser?

    python -m benchmarks.report RECORD.json OUT.html

The page is one file and loads nothing: `report.html` is its text, `report.css` its looks and
`report.js` its plots and tables, with the record embedded as JSON. Only performance profiles are
computed here; all else is shown as recorded.
"""

from __future__ import annotations

import argparse
import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

# The keys that a record must have, as nested as the record: a list holds the shape of its items.
SHAPE: dict[str, Any] = {
    **dict.fromkeys(("title", "seed", "commit", "date", "quick")),
    "environment": {},
    "figures": {
        **dict.fromkeys(("failures", "bound_violations", "worst_ratio_torchdeq")),
        **dict.fromkeys(("geomean_forward_ratio_published", "geomean_backward_ratio_published")),
        "floor_ratio": {},
    },
    "cells": [
        {
            **dict.fromkeys(("problem", "family", "n", "batch", "m", "skew", "threads", "tol")),
            **dict.fromkeys(("dtype", "direction", "product_seconds")),
            "results": [
                dict.fromkeys(("method", "seconds", "steps", "status", "residual", "detail"))
            ],
        }
    ],
    "curves": [
        {"problem": None, "method": None, "steps": [], "milliseconds": [], "residual": []},
    ],
    "scaling": {
        "points": [dict.fromkeys(("n", "batch", "seconds"))],
        **dict.fromkeys(("slope_n", "slope_batch")),
    },
}


class RecordError(ValueError):
    """A record that lacks what the page shows; the message names every fault."""


def render(record: Mapping[str, Any]) -> str:
    """Return the record as one HTML page that needs no other file and no network.

    Raises:
        RecordError: if keys are missing or have another shape than `SHAPE`, or a time is not
            positive.
    """
    faults = list(_faults(record, SHAPE, "")) or list(_uneven(record["curves"]))
    if faults:
        raise RecordError(f"not a record of the solver benchmark: {'; '.join(faults)}")
    try:
        profiles = _profiles(record["cells"])
    except ValueError as error:
        raise RecordError(f"not a record of the solver benchmark: {error}") from error
    parts = {
        "title": html.escape(str(record["title"])),
        "style": (HERE / "report.css").read_text(encoding="utf-8"),
        "script": (HERE / "report.js").read_text(encoding="utf-8"),
        "payload": _embed({"record": record, "profiles": profiles}),
    }
    page = (HERE / "report.html").read_text(encoding="utf-8")
    # Cut before filling: what is filled in may itself look like a slot.
    texts = page.replace("}}", "{{").split("{{")
    return "".join(parts[text] if index % 2 else text for index, text in enumerate(texts))


def performance_profile(
    times: Mapping[str, Sequence[float | None]],
) -> dict[str, list[tuple[float, float]]]:
    """Return for each method the share of cells it solves within τ times the fastest.

    A method's share is a step function of τ. It is given by its corners (τ, share from there on),
    the first at τ = 1, and stays constant after the last. Shares are of all cells: one that no
    method solves lowers every profile. Reference: Dolan and Moré (2002), section 2.

    Args:
        times: seconds of each method, cell by cell in the same order; None, NaN or infinity
            where it failed.

    Raises:
        ValueError: if the methods differ in their number of cells or a time is not positive.
    """
    lengths = {method: len(seconds) for method, seconds in times.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"every method needs one time per cell, got numbers of cells {lengths}")
    solved = {
        method: [math.inf if s is None or math.isnan(s) else s for s in seconds]
        for method, seconds in times.items()
    }
    if any(s <= 0 for seconds in solved.values() for s in seconds):
        raise ValueError("times must be positive: give None where a method failed")
    fastest = [min(cell) for cell in zip(*solved.values(), strict=True)]

    profile = {}
    for method, seconds in solved.items():
        pairs = zip(seconds, fastest, strict=True)
        ratios = [s / best for s, best in pairs if math.isfinite(s)]
        corners = sorted({1.0, *ratios}) if seconds else []
        profile[method] = [(tau, sum(r <= tau for r in ratios) / len(seconds)) for tau in corners]
    return profile


def _profiles(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the profile of each direction, over the cells in which all its methods took part."""
    profiles = {}
    for direction in dict.fromkeys(cell["direction"] for cell in cells):
        timed = [
            {result["method"]: result["seconds"] for result in cell["results"]}
            for cell in cells
            if cell["direction"] == direction
        ]
        methods = dict.fromkeys(method for cell in timed for method in cell)
        timed = [cell for cell in timed if cell.keys() == methods.keys()]
        profiles[direction] = {
            "cells": len(timed),
            "methods": performance_profile(
                {method: [cell.get(method) for cell in timed] for method in methods}
            ),
        }
    return profiles


def _faults(value: Any, shape: Any, path: str) -> Iterator[str]:
    """Yield where the value lacks the keys or lists of the shape; null may stand for an object."""
    kind, word = (list | tuple, "a list") if isinstance(shape, list) else (Mapping, "an object")
    if shape is None:
        return
    if not isinstance(value, kind):
        yield f"{path or 'the record'} should be {word}, got {type(value).__name__}"
    elif isinstance(shape, list):
        for index, item in enumerate(value if shape else ()):
            yield from _faults(item, shape[0], f"{path}[{index}]")
    else:
        missing = [key for key in shape if key not in value]
        if missing:
            yield f"{path or 'the record'} lacks {', '.join(missing)}"
        for key, inner in shape.items():
            if key in value and not (value[key] is None and isinstance(inner, dict)):
                yield from _faults(value[key], inner, f"{path}.{key}".lstrip("."))


def _uneven(curves: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the curves whose lists differ in length."""
    for index, curve in enumerate(curves):
        lengths = [len(curve[key]) for key in ("steps", "milliseconds", "residual")]
        if len(set(lengths)) > 1:
            yield (
                f"curves[{index}] has {lengths[0]} steps, {lengths[1]} milliseconds and "
                f"{lengths[2]} residuals"
            )


def _embed(value: Any) -> str:
    """Return JSON that is safe inside a script element.

    JSON has no NaN and no infinity: they become the words that JavaScript's Number() reads.
    A script element ends at the first "</script", also within a string: no "<" is left.
    """

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return value

    return json.dumps(finite(value), allow_nan=False).replace("<", "\\u003c")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page of a record."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="a record of the solver benchmark as a page"
    )
    options.add_argument("record", type=Path, help="JSON file written by the solver benchmark")
    options.add_argument("out", type=Path, help="HTML file to write")
    given = options.parse_args(arguments)
    try:
        page = render(json.loads(given.record.read_text(encoding="utf-8")))
    except OSError as error:
        options.error(f"cannot read {given.record}: {error.strerror}")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        options.error(f"{given.record} is not JSON: {error}")
    except RecordError as error:
        options.error(f"{given.record} is {error}")
    try:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(page, encoding="utf-8")
    except OSError as error:
        options.error(f"cannot write {given.out}: {error.strerror}")
    print(f"wrote {given.out} ({len(page) / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
