"""How long does a call take on the device, and how long until the host has its result?

Three figures per call. `kernels` is the sum of the kernels' times as PyTorch's profiler sees them,
`events` the time between CUDA events around several calls, gaps between kernels included, `wall`
the host's clock until the device is done. On a CPU the first is unknown and the others are one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

ROUNDS = 7
_SLOW = 0.25
"""Seconds: what takes longer is timed in three rounds."""
_ENOUGH = 0.02
"""Seconds between two events."""
_MOST = 100
"""Calls between two events."""
_FRESH = 0.02
"""Seconds: a shorter call follows an untimed one of its own, whose data the caches then hold."""

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per call, medians over rounds; `kernels` None where no profiler sees them."""

    kernels: float | None
    events: float
    wall: float

    @property
    def device(self) -> float:
        """Time on the device: of the kernels where known, else between events."""
        return self.events if self.kernels is None else self.kernels

    def row(self) -> dict[str, float | None]:
        """Return the figures in milliseconds."""
        kernels = None if self.kernels is None else 1e3 * self.kernels
        return {
            "kernels, ms": kernels,
            "events, ms": 1e3 * self.events,
            "wall, ms": 1e3 * self.wall,
        }


def timed(candidates: Mapping[str, Call], device: str, rounds: int = ROUNDS) -> dict[str, Timing]:
    """Time calls in turn, round by round, after two untimed calls each.

    Compilation belongs to the first call and is in none of the figures.
    """
    once = {}
    for name, call in candidates.items():
        call()
        waited(call, device)
        once[name] = waited(call, device)
    repeats = {name: min(_MOST, max(1, math.ceil(_ENOUGH / once[name]))) for name in candidates}
    walls: dict[str, list[float]] = {name: [] for name in candidates}
    events: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds):
        for name, call in candidates.items():
            if once[name] > _SLOW and index >= 3:
                continue
            if once[name] < _FRESH:
                call()
            walls[name].append(waited(call, device))
            events[name].append(between_events(call, repeats[name], device))
    return {
        name: Timing(
            kernels=kernel_seconds(call, device),
            events=statistics.median(events[name]),
            wall=statistics.median(walls[name]),
        )
        for name, call in candidates.items()
    }


def waited(call: Call, device: str) -> float:
    """Return the seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def between_events(call: Call, repeats: int, device: str) -> float:
    """Return the seconds per call between events around so many calls."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(repeats):
        call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / repeats


def kernel_seconds(call: Call, device: str, repeats: int = 3) -> float | None:
    """Return the seconds per call in which kernels and copies run, None where nothing sees them."""
    if device != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(repeats):
                call()
            torch.cuda.synchronize()
        micros = sum(event.self_device_time_total for event in profile.key_averages())
    except (RuntimeError, AttributeError):
        return None
    return micros / 1e6 / repeats or None


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
