"""How long will a run take? A bar on a terminal; elsewhere one line with an estimate."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

try:
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "training and evaluation show how long they take by tqdm, which is not installed: "
        "pip install 'lben[cli]'",
        name=error.name,
    ) from error

T = TypeVar("T")

_PATIENCE = 5.0
"""Seconds before a run without a terminal prints its estimate."""


class Progress:
    """Count finished items and show the time that is left.

    On a terminal it is a bar of tqdm. Where standard error is a file or a pipe there is one line
    when the first items have taken some seconds, with the time that is left, and one at the end.

    Args:
        total: number of items.
        what: name of the work, shown before the bar.
        unit: name of the items, in the plural.
        quiet: True for no output; None for a bar if standard error is a terminal, else lines.
        initial: items that were finished before.
    """

    def __init__(
        self, total: int, what: str, unit: str, quiet: bool | None = None, *, initial: int = 0
    ) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done, self.initial, self.started = initial, initial, time.perf_counter()
        self.bar = tqdm(
            total=total, initial=initial, desc=what, unit=unit, disable=quiet, dynamic_ncols=True,
            leave=False,
        )  # fmt: skip
        self._lines = quiet is None and bool(self.bar.disable)
        self._said = False

    def update(self, count: int = 1) -> None:
        """Count finished items; print the estimate once, if there is no terminal."""
        self.done += count
        self.bar.update(count)
        if self._lines and not self._said and self.seconds > _PATIENCE and self.done < self.total:
            self._said = True
            self._say(
                f"{self.done} of {self.total} {self.unit}, about {format_seconds(self.left)} left"
            )

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.perf_counter() - self.started

    @property
    def left(self) -> float:
        """Seconds that the other items will take at the pace so far."""
        return self.seconds * (self.total - self.done) / max(self.done - self.initial, 1)

    def note(self, **values: Any) -> None:
        """Show values behind a bar."""
        self.bar.set_postfix(**values)

    def _say(self, words: str) -> None:
        with suppress(OSError):  # nobody listens
            print(f"{self.what}: {words}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
        if self._said and error is None:
            self._say(f"{self.total} {self.unit} in {format_seconds(self.seconds)}")


def track(items: Collection[T], what: str, unit: str, quiet: bool | None = None) -> Iterator[T]:
    """Yield items and count them, see `Progress`.

    Args:
        items: that are yielded.
        what, unit, quiet: as in `Progress`.
    """
    with Progress(len(items), what, unit, quiet) as progress:
        for item in items:
            yield item
            progress.update()


def format_seconds(seconds: float) -> str:
    """Return a time as people say it: 20 seconds, 4 minutes, 2.5 hours.

    Args:
        seconds: of time.
    """
    for size, unit in ((3600, "hour"), (60, "minute")):
        if seconds >= 1.5 * size:
            number = seconds / size
            return f"{number:.1f} {unit}s" if number < 10 else f"{number:.0f} {unit}s"
    number = max(round(seconds), 1)
    return f"{number} second{'s' if number > 1 else ''}"
