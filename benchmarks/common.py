"""What do all benchmarks share? Options, fair timing, and results that can be traced."""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lben import EquilibriumClassifier
from lben.data import DataError, Dataset, load
from lben.evaluation.accuracy import environment
from lben.records import to_json
from lben.training import checkpoints

RESULTS = Path(__file__).parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="a subset in under 50 seconds")
    options.add_argument("--out", type=Path, help="also write the JSON object to this file")
    return options


def find_root(given: str | None) -> str:
    """Return the data folder: the one given, or the first usual place that holds MNIST."""
    for candidate in [given] if given else ["data", "../data"]:
        if candidate and (Path(candidate) / "MNIST" / "raw").is_dir():
            return candidate
    raise DataError("no MNIST/raw folder found in data or ../data: name its parent with --root")


def mnist_of(given: str | None, benchmark: str) -> tuple[str, Dataset]:
    """Return the data folder and MNIST in it, or end the run with one line that says why not."""
    try:
        root = find_root(given)
        return root, load("mnist", root)
    except DataError as error:
        sys.exit(f"benchmarks.{benchmark}: {error}")


def trained(name: str) -> EquilibriumClassifier:
    """Return a model that `benchmarks.mnist` has left in results/mnist."""
    model = checkpoints.load_model(RESULTS / "mnist" / name)
    assert isinstance(model, EquilibriumClassifier)
    return model


def _commit() -> str:
    """Return the commit of the tree that runs, marked when it has uncommitted changes.

    Where there is no repository: what the environment variable COMMIT says, or else a digest of
    the sources.
    """
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "../solvers", "../lben", ".", ":!results")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "").strip()[:12] or _digest(here.parent)


def _digest(root: Path) -> str:
    """Return a name of the sources as they are."""
    digest = hashlib.sha256()
    for package in ("benchmarks", "lben", "solvers"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return "sources-" + digest.hexdigest()[:12]


COMMIT = _commit()  # of the code that is now loaded, whatever happens to the tree meanwhile


def circumstances() -> dict[str, Any]:
    """Return where and when the figures of this run were measured."""
    return {
        "commit": COMMIT,
        "date": datetime.now(UTC).date().isoformat(),
        "environment": environment(),
    }


def finish(figures: Mapping[str, Any], out: Path | None, **details: Any) -> None:
    """Print the figures as the last line, and write them with their circumstances to a file."""
    if out is not None:
        write(out, {**figures, **details, **circumstances()})
    print(to_json(figures, indent=None))


def write(out: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON; whoever reads meanwhile finds the old one or the new one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(out.name + ".unfinished")
    unfinished.write_text(to_json(record, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, out)


_SHORT = 0.02


def interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Time the candidates in turn, round by round, and return seconds per call of each.

    A call of less than 20 ms is timed after an untimed one of the same candidate: the caches then
    hold what belongs to it, not to whoever came before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    last: dict[str, float] = {}
    for index in range(warmup + rounds):
        for name, call in candidates.items():
            if index >= warmup and last.get(name, 0.0) < _SHORT:
                call()
            start = time.perf_counter()
            call()
            last[name] = time.perf_counter() - start
            if index >= warmup:
                seconds[name].append(last[name])
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, reference: str) -> float:
    """Return the median over rounds of time(name) / time(reference)."""
    pairs = zip(seconds[name], seconds[reference], strict=True)
    return statistics.median(a / b for a, b in pairs)
