"""How long should a solve take on a GPU, and what holds it back? A roofline with latencies.

    python -m benchmarks.gpu_model [--chip H100|H200] [--steps S] [--bases B] [--checks C]

prints the table. A solve consists of increments with one product of bfloat16, of bases with an
exact product (Note [Increments] of `solvers.backends.triton_kernels`), and now and then of a check,
which is an exact product with W.

Up to 256 units one program solves for 64 samples. A phase occupies each unit of its multiprocessor
for a number of clocks: multiply-adds ÷ rate, instructions ÷ issue slots, bytes from the second
cache ÷ its bandwidth; the largest is the bound. All programs take `waves` rounds, in which a phase
takes

    max(together · bound + `GAP`, latency) ÷ clock,

together the programs that share a multiprocessor, latency what one needs alone: every product of
tensor cores is waited for. Above 256 units a phase is a launch of tiles, which takes at least its
bytes ÷ the bandwidth of memory. The unfused loop is PyTorch's, one library call per operation.

Instructions are those of the machine code that Triton 3.6.0 makes for sm_90
(`benchmarks.gpu_compiled`). Overlap within the bound is taken for perfect: expect 0.6 to 0.8 of the
speed.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

Who = Literal["lben", "unfused"]
SIZES = (80, 128, 256, 512, 1024, 4096)
BATCHES = (128, 1024, 8192, 65536)
STEPS, BASES, CHECKS = 16.0, 4.0, 2.0
"""Of a solve at tol 1e-4 and m = 0.3: `python -m benchmarks.gpu_phases`, 16 to 18 steps."""
UNFUSED_CHECKS = 3.5
"""Of PyTorch's loop in the same solve."""
HOST = 150.0
"""Microseconds of Python per solve."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What a GPU does per clock and multiprocessor, and per second in all.

    Attributes:
        name: as its datasheet says.
        memory: bytes per second of the datasheet.
        multiprocessors: their number.
        clock: of a multiprocessor under load, 1/s.
        ffma: float32 multiply-adds.
        tf32: multiply-adds of tensor cores with TF32 factors.
        bf16: the same with bfloat16 factors.
        issue: instructions of a warp.
        second_cache: bytes from the second cache, per clock and multiprocessor.
        achieved: the share of `memory` that streaming kernels reach.
        sgemm: operations per second of the library's float32 product.
    """

    name: str
    memory: float
    multiprocessors: int = 132
    clock: float = 1.755e9
    ffma: int = 128
    tf32: int = 1024
    bf16: int = 2048
    issue: int = 4
    second_cache: float = 24.0
    achieved: float = 0.9
    sgemm: float = 50e12

    def rate(self, per_clock: float) -> float:
        """Return operations per second of all multiprocessors, two per multiply-add."""
        return 2 * per_clock * self.multiprocessors * self.clock

    def stream(self, count: float) -> float:
        """Return the microseconds in which so many bytes come from or go to memory."""
        return 1e6 * count / (self.achieved * self.memory)


H100 = Chip(name="H100 SXM", memory=3.35e12)
H200 = Chip(name="H200", memory=4.8e12)


def chip(name: str) -> Chip:
    """Return the chip with this device name; an H100 where the name says nothing."""
    return H200 if "H200" in name else H100


@dataclass(frozen=True, kw_only=True)
class Resident:
    """What a program with 64 samples of some width does, counted in its machine code.

    Attributes:
        step, base, check: instructions of a warp.
        warps: of the program.
        per_sm: programs that share a multiprocessor, by registers and shared memory.
        blocks: tiles that the units are cut into.
        depth: of products whose matrix comes from the second cache.
        exact: whence the matrices of bases and of checks come: "held" on the chip, "turns" for the
            part that is and then the others, or "parts", which Triton gives to all warps alike but
            for the last of six.
    """

    step: float
    base: float
    check: float
    warps: int = 4
    per_sm: int = 2
    blocks: int = 1
    depth: int = 16
    exact: tuple[str, str] = ("held", "held")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts of the compiled loops; `counted` replaces them by those of a compilation.

    Attributes:
        resident: of programs that hold their samples, by width.
        tile: instructions of a warp per tile and depth of what is launched per step, by kernel.
    """

    resident: Mapping[int, Resident] = field(
        default_factory=lambda: {
            32: Resident(step=47, base=805, check=990),
            64: Resident(step=89, base=1444, check=2006),
            80: Resident(step=121, base=1953, check=2833, blocks=2),
            128: Resident(
                step=129,
                base=2209,
                check=3250,
                warps=8,
                per_sm=1,
                depth=32,
                exact=("held", "parts"),
            ),
            256: Resident(
                step=247, base=4634, check=10533, warps=8, per_sm=1, exact=("turns", "parts")
            ),
        }
    )
    tile: Mapping[str, float] = field(
        default_factory=lambda: {"increment": 77, "advance": 573, "look": 556}
    )


COUNTS = Counts()
GAP = 110.0
"""Clocks at which no unit is busy in a phase, whoever shares the multiprocessor."""
_LATENCY = 135.0
"""Clocks between an instruction of tensor cores and the use of its result, and of a barrier."""
_TILE_SHARE = 0.8
"""The share of the bound that loops over tiles reach."""
_EPILOGUE = 1700.0
"""Clocks before the first and after the last product of a tile."""
_LAUNCH = 2.8
"""Microseconds from a kernel's end to the next one's first instruction, on the device."""
_WAIT = 12.0
"""Microseconds until the host has read a number and launches again."""
_UNFUSED_PASSES = 16
"""Passes of four bytes per element over memory at a check of PyTorch's loop."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a phase costs.

    Attributes:
        kernel: its name.
        programs, per_sm, waves: how the batch is cut, as the file's docstring says.
        clocks: of each unit of a multiprocessor, for one program.
        bytes: through memory, all programs.
        microseconds: of all programs.
        bound: the unit that is busy longest.
    """

    kernel: str
    programs: int
    per_sm: int
    waves: int
    clocks: Mapping[str, float]
    bytes: float
    microseconds: float
    bound: str


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A solve: its phases and how often each takes place."""

    who: Who
    n: int
    batch: int
    phases: Mapping[str, tuple[float, Cost]]

    @property
    def microseconds(self) -> float:
        """Time on the device."""
        return sum(count * cost.microseconds for count, cost in self.phases.values())


def predict(
    who: Who,
    n: int,
    batch: int,
    *,
    steps: float = STEPS,
    bases: float = BASES,
    checks: float | None = None,
    chip: Chip = H100,
    counts: Counts = COUNTS,
) -> Prediction:
    """Predict a solve of n units in float32.

    Args:
        who: the kernels of this package, or PyTorch's loop.
        n: units.
        batch: samples.
        steps: of the iteration.
        bases: those of the steps that are exact.
        checks: of the residual; `CHECKS` or `UNFUSED_CHECKS` when omitted.
        chip: where it runs.
        counts: of the compiled loops.
    """
    if who == "unfused":
        step, check = _unfused(n, batch, chip)
        looks = UNFUSED_CHECKS if checks is None else checks
        phases = {"step": (steps + 1, step), "check": (looks, check)}  # one more: the shift
        return Prediction(who=who, n=n, batch=batch, phases=phases)
    phases_of = _resident if n <= max(counts.resident) else _launched
    step, base, check = phases_of(n, batch, chip, counts)
    bases = min(bases, steps)
    phases = {
        "step": (steps - bases, step),
        "base": (bases, base),
        "check": (CHECKS if checks is None else checks, check),
    }
    return Prediction(who=who, n=n, batch=batch, phases=phases)


def _resident(n: int, batch: int, chip: Chip, counts: Counts) -> tuple[Cost, Cost, Cost]:
    """Return step, base and check of the kernel that is launched once per solve."""
    width = min(w for w in counts.resident if w >= n)
    own = counts.resident[width]
    programs = math.ceil(batch / 64)
    together = min(own.per_sm, math.ceil(programs / chip.multiprocessors))
    waves = math.ceil(programs / (chip.multiprocessors * own.per_sm))
    one = 64 * width * width / chip.bf16
    cache = 6.0 * width * width / chip.second_cache

    def phase(instructions: float, tensor: float, cache: float, products: int) -> Cost:
        clocks = {
            "tensor cores": tensor, "issue": instructions * own.warps / chip.issue,
            "second cache": cache,
        }  # fmt: skip
        bound = max(clocks, key=clocks.__getitem__)
        # Alone, a program's warps issue one instruction per clock and scheduler at most.
        latency = max(clocks[bound], tensor + instructions + products * _LATENCY)
        wave = max(together * clocks[bound] + GAP, latency)
        name = bound if together * clocks[bound] + GAP >= latency else "latency"
        return Cost(
            kernel="resident", programs=programs, per_sm=own.per_sm, waves=waves, clocks=clocks,
            bytes=0.0, microseconds=1e6 * waves * wave / chip.clock, bound=name,
        )  # fmt: skip

    chunks = width // own.depth
    kinds = {
        "held": (6 * one, 0.0, 6 * own.blocks**2),
        "turns": (6 * one, cache, 3 * chunks // 2 + 3),
        "parts": (11 * one, cache, 6 * own.blocks * chunks),
    }
    base, check = (
        phase(count, *kinds[kind])
        for count, kind in zip((own.base, own.check), own.exact, strict=True)
    )
    return phase(own.step, one, 0.0, own.blocks**2), base, check


def _launched(n: int, batch: int, chip: Chip, counts: Counts) -> tuple[Cost, Cost, Cost]:
    """Return step, base and check of the kernels that are launched per step."""
    area, tile = n * batch, 128 * 128
    increment = _in_tiles(
        "increment", n, batch, chip, counts, depth=64, tensor=tile * 64 / chip.bf16,
        bytes=12.0 * area + 2 * n * n,
    )  # fmt: skip
    product = partial(
        _in_tiles, n=n, batch=batch, chip=chip, counts=counts, depth=32,
        tensor=3 * tile * 32 / chip.tf32,
    )  # fmt: skip
    base = product("advance", bytes=18.0 * area + 4 * n * n)
    check = product("look", bytes=20.0 * area + 4 * n * n)  # its prox is PyTorch's
    wait = partial(_later, by=_WAIT)
    return increment, wait(base), wait(check)


def _later(cost: Cost, by: float) -> Cost:
    return replace(cost, microseconds=cost.microseconds + by)


def _in_tiles(
    kernel: str, n: int, batch: int, chip: Chip, counts: Counts, *, depth: int, tensor: float,
    bytes: float,
) -> Cost:  # fmt: skip
    """Return the cost of one launch of a product in tiles of 128 × 128, 8 warps."""
    programs = math.ceil(batch / 128) * math.ceil(n / 128)
    waves = math.ceil(programs / chip.multiprocessors)
    clocks = {"tensor cores": tensor, "issue": counts.tile[kernel] * 8 / chip.issue}
    bound = max(clocks, key=clocks.__getitem__)
    wave = math.ceil(n / depth) * clocks[bound] / _TILE_SHARE + _EPILOGUE
    busy, stream = 1e6 * waves * wave / chip.clock, chip.stream(bytes)
    return Cost(
        kernel=kernel, programs=programs, per_sm=1, waves=waves, clocks=clocks, bytes=bytes,
        microseconds=max(busy, stream) + _LAUNCH, bound="memory" if stream > busy else bound,
    )  # fmt: skip


def _unfused(n: int, batch: int, chip: Chip) -> tuple[Cost, Cost]:
    """Return step and check of PyTorch's loop."""
    area = n * batch
    product = max(2e6 * n * n * batch / chip.sgemm, chip.stream(12 * area + 4 * n * n))
    passes = chip.stream(16 * area)  # a copy, and |x| in place
    seconds = max(product + passes, 3 * _LAUNCH)
    bound = "library" if product > passes else "memory"
    step = Cost(
        kernel="library", programs=1, per_sm=1, waves=1, clocks={}, bytes=28.0 * area + 4 * n * n,
        microseconds=seconds, bound="launches" if seconds > product + passes else bound,
    )  # fmt: skip
    looks = chip.stream(4 * _UNFUSED_PASSES * area)
    return step, replace(step, microseconds=product + looks, bytes=(12 + 64) * area + 4.0 * n * n)


def floor(n: int, batch: int, per_clock: float, chip: Chip = H100) -> float:
    """Return the microseconds of n²·batch multiply-adds at a rate per clock and multiprocessor."""
    return 2e6 * n * n * batch / chip.rate(per_clock)


def ratio_unfused(
    n: int, batch: int = 65536, chip: Chip = H100, counts: Counts = COUNTS, host: float = HOST
) -> float:
    """Return how many times the unfused loop takes as long, each with its host."""
    own = predict("lben", n, batch, chip=chip, counts=counts).microseconds
    other = predict("unfused", n, batch, chip=chip).microseconds
    return (other + host) / (own + host)


def counted(rows: Iterable[Mapping[str, Any]], counts: Counts = COUNTS) -> Counts:
    """Return the counts with those of compiled kernels in place of the ones for their kernel.

    Read are the float32 solves with ReLU for sm_90. In the loop of `resident` the longest jump
    passes over the check; a product loop that is not the shortest streams a matrix, `depth` of its
    width at a time.

    Args:
        rows: of `benchmarks.gpu_compiled.rows`; what they do not name stays.
        counts: what else is known.
    """
    resident, tile = dict(counts.resident), dict(counts.tile)
    for row in rows:
        units = re.match(r"(?:increment )?n=(\d+) float32 (?:PeacemanRachford )?ReLU", row["case"])
        loops = [found for found in row.get("loops") or () if found["product"]]
        if row.get("error") or row["target"] != "sm_90" or units is None or not loops:
            continue
        shortest = min(loops, key=lambda found: found["instructions"])
        if row["kernel"] in tile:
            tile[row["kernel"]] = shortest["instructions"]
        elif row["kernel"] == "resident":
            width = min(w for w in resident if w >= int(units[1]))
            resident[width] = _read(row["loops"], loops, shortest, width, resident[width])
    return Counts(resident=resident, tile=tile)


def _read(
    loops: Sequence[Mapping[str, Any]], products: Sequence[Mapping[str, Any]],
    step: Mapping[str, Any], width: int, known: Resident,
) -> Resident:  # fmt: skip
    """Return the instructions of the phases in the loop of a solve."""
    whole = max(loops, key=lambda found: found["instructions"])
    first, last, check = whole["skip"]
    base = whole["instructions"] - check - step["instructions"]
    for loop in products:
        if loop is not step:
            again = (width // known.depth - 1) * loop["instructions"]
            in_check = first < loop["start"] < last
            check, base = check + again * in_check, base + again * (not in_check)
    return replace(known, step=step["instructions"], base=base, check=check)


def table(
    sizes: Sequence[int] = SIZES,
    batches: Sequence[int] = BATCHES,
    *,
    steps: float = STEPS,
    bases: float = BASES,
    checks: float | None = None,
    chip: Chip = H100,
    counts: Counts = COUNTS,
) -> list[dict[str, Any]]:
    """Return a row per cell and loop; times in microseconds on the device."""
    rows = []
    for n in sizes:
        for batch in batches:
            for who in get_args(Who):
                found = predict(
                    who, n, batch, steps=steps, bases=bases, checks=checks, chip=chip,
                    counts=counts,
                )  # fmt: skip
                row: dict[str, Any] = {"n": n, "batch": batch, "who": who}
                for name, (_, cost) in found.phases.items():
                    row[f"{name}, µs"] = cost.microseconds
                    row[f"{name} bound by"] = cost.bound
                step = found.phases["step"][1]
                row |= {
                    "solve, µs": found.microseconds, "bytes of a step": step.bytes,
                    "programs": step.programs, "per SM": step.per_sm, "waves": step.waves,
                    "of float32": floor(n, batch, chip.ffma, chip) / step.microseconds,
                    "of bfloat16": floor(n, batch, chip.bf16, chip) / step.microseconds,
                }  # fmt: skip
                rows.append(row)
    return rows


def main() -> None:
    """Print the table."""
    from benchmarks.gpu_record import markdown

    options = argparse.ArgumentParser(description="predicted times of solves on a GPU")
    options.add_argument("--chip", choices=("H100", "H200"), default="H100")
    options.add_argument("--steps", type=float, default=STEPS)
    options.add_argument("--bases", type=float, default=BASES)
    options.add_argument("--checks", type=float)
    given = options.parse_args()
    rows = table(steps=given.steps, bases=given.bases, checks=given.checks, chip=chip(given.chip))
    print(markdown(rows))
    print({n: round(ratio_unfused(n, chip=chip(given.chip)), 2) for n in SIZES})


if __name__ == "__main__":
    main()
