"""How does a measurement with a budget of minutes keep what it has found?

It consists of cells. Every cell is written to the record as soon as it is done, a cell that fails
with its error, and no cell begins for which the time that is left does not suffice. A record is
continued by a later run of the same commit.
"""

from __future__ import annotations

import json
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.common import circumstances, write

_MARGIN = 3.0
"""Seconds that remain for the record when a cell is stopped."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A measurement that is kept or missing as a whole.

    Attributes:
        part: of the benchmark that it belongs to.
        name: within the record.
        seconds: that it is expected to take.
        call: given the seconds that are left, returns what was found, in JSON's types.
        apart: whether the call waits for a process of its own, so that several may run at a time.
    """

    part: str
    name: str
    seconds: float
    call: Callable[[float], Any]
    apart: bool = False


class Record:
    """What is known at one commit, in a file.

    Args:
        path: of the file; what it holds of other commits is forgotten.
        commit: of the tree that runs.
    """

    def __init__(self, path: Path, commit: str) -> None:
        self.path, self.commit = path, commit
        known = json.loads(path.read_text()) if path.exists() else {}
        self.cells: dict[str, dict[str, Any]] = {
            name: cell for name, cell in known.items() if cell.get("commit") == commit
        }
        self._lock = threading.Lock()

    def found(self, name: str) -> Any:
        """Return what a cell has found, None if it is missing or has failed."""
        return self.cells.get(name, {}).get("found")

    def of(self, part: str) -> dict[str, dict[str, Any]]:
        """Return the cells of one part by name."""
        return {name: cell for name, cell in self.cells.items() if cell["part"] == part}

    def has(self, cell: Cell, since: float) -> bool:
        """Say whether a cell need not run: it was found, or has failed since that time."""
        known = self.cells.get(cell.name)
        return known is not None and ("found" in known or known["ended"] >= since)

    def keep(self, cell: Cell, result: Mapping[str, Any], seconds: float) -> None:
        """Write a cell's result, {"found": …} or {"error": …}, and all others."""
        entry = {
            "part": cell.part, **result, "seconds": round(seconds, 2), "ended": time.time(),
            **circumstances(), "commit": self.commit,
        }  # fmt: skip
        with self._lock:
            self.cells[cell.name] = entry
            write(self.path, self.cells)
            self.path.with_suffix(".md").write_text(self.table(), encoding="utf-8")

    def table(self) -> str:
        """Return all cells in Markdown."""
        lines = []
        for name, cell in self.cells.items():
            lines += [f"## {name} ({cell['commit']}, {cell['date']}, {cell['seconds']:g} s)", ""]
            found = cell["found"] if "found" in cell else {"error": cell["error"]}
            lines += [markdown(found if isinstance(found, list) else [found]), ""]
        return "\n".join(lines)


def run_cells(
    cells: Sequence[Cell],
    record: Record,
    deadline: float,
    *,
    since: float,
    together: int = 8,
    lost: Callable[[], bool] = lambda: False,
    restart: Callable[[], None] = lambda: None,
) -> None:
    """Run what is missing, in this order.

    Args:
        cells: neighbours with `apart` run at the same time.
        record: where results go.
        deadline: of `time.time`; no cell begins that would end after it, and one that does not end
            is stopped.
        since: a cell that has failed before this time is tried again.
        together: how many processes run at a time.
        lost: whether this process can no longer use the device; asked after a failure.
        restart: what to do then; need not return.
    """
    for apart, group in groupby(cells, key=lambda cell: cell.apart):
        missing = [cell for cell in group if not record.has(cell, since)]
        if apart:
            with ThreadPoolExecutor(together) as pool:
                list(pool.map(lambda cell: _run(cell, record, deadline), missing))
            continue
        for cell in missing:
            if not _run(cell, record, deadline) and lost():
                restart()


def _run(cell: Cell, record: Record, deadline: float) -> bool:
    """Run a cell if the time suffices; say whether all is well."""
    start = time.time()
    left = deadline - start
    if left < cell.seconds:
        print(f"--- {cell.name}: not begun, {left:.0f} of {cell.seconds:.0f} s left", flush=True)
        return True
    print(f"--- {cell.name}", flush=True)
    try:
        with _stopped_after(left - _MARGIN):
            result: dict[str, Any] = {"found": cell.call(left - _MARGIN)}
    except Exception as error:  # the next cell may do better
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {str(error).strip()[:2000]}"}
    record.keep(cell, result, time.time() - start)
    text = markdown([result]) if "error" in result else ""
    print(text or json.dumps(record.cells[cell.name]["found"], default=str)[:1500], flush=True)
    return "error" not in result


@contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds, where the system has alarms."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield  # cells of other threads wait for processes, and with a limit
        return

    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a table, one column per key."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    if not names:
        return ""
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_shown(row.get(key)) for key in names) + " |" for row in rows]
    return "\n".join(lines)


def _shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "¦").replace("\n", " ")
