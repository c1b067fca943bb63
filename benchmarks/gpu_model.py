"""How long should a solve take on a GPU, and what holds it back? A roofline with latencies.

    python -m benchmarks.gpu_model [--chip H100|H200] [--steps S] [--checks C]

prints the table. A program is a block of threads that owns `rows` samples of the batch; a
multiprocessor runs `per_sm` programs at a time, and all programs take `waves` rounds. In one step a
program occupies each unit of its multiprocessor for a number of clocks: multiply-adds ÷ rate,
instructions ÷ issue slots, bytes ÷ bandwidth. The largest is the bound. A step takes

    waves · max(together · bound + `GAP`, latency) ÷ clock,

together the programs that share a multiprocessor, latency what one program needs alone. A kernel
that is launched per step takes at least its bytes ÷ the bandwidth of memory, and a launch.

The counts of instructions are those of the machine code that Triton 3.6.0 makes for sm_90. All
predictions assume perfect overlap within the bound: expect 0.6 to 0.8 of the speed.

Designs, n units:

- now: float32 multiply-adds outside the tensor cores; M from shared memory (n ≤ 128), in tiles
  (n ≤ 512), one launch per step above.
- stage 1: the same kernels with products of bfloat16 or TF32 parts on tensor cores (six bfloat16
  products, or three of TF32, for one in float32).
- six: units in two blocks without padding to a power of two, six products; above 256 units one
  launch per step in tiles.
- increments: x ← p₀ + (ρ(x) − ρ(x₀))M with one bfloat16 product; exact products only at checks,
  of which each is the base x₀, p₀ = T(x₀) of the next block.
- unfused: PyTorch's loop, one library call per operation.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

Design = Literal["now", "stage 1", "six", "increments", "unfused"]
SIZES = (80, 128, 256, 512, 1024, 4096)
BATCHES = (128, 1024, 8192, 65536)
STEPS, CHECKS = 15.0, 3.5
"""Of a solve at tol 1e-4 with m ≥ 0.1: counted on a CPU, 14 to 16 steps and 3 or 4 checks."""
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
        f64: the same in float64.
        shared: bytes from and to shared memory.
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
    f64: int = 128
    shared: int = 128
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
class Counts:
    """Counts of the compiled loops; `counted` replaces them by those of a compilation.

    Attributes:
        step: instructions of a warp in one step of the kernel for n ≤ 128, by number of units.
        check: instructions of a warp in its check, the base of the next block included.
        wide_step, wide_check: the same for 256 units, 64 rows and 8 warps.
        wide_chunk: instructions per 32 × 256 chunk of a product of six in that kernel.
        loop: instructions of the hot loop of the other kernels, by name; of `resident` per step,
            of kernels in tiles per tile and depth.
        shared: bytes of shared memory of a program, by kernel.
        registers: of a thread, by kernel.
    """

    step: Mapping[int, float] = field(default_factory=lambda: {64: 99, 80: 121, 128: 242})
    check: Mapping[int, float] = field(default_factory=lambda: {64: 2722, 80: 3912, 128: 6097})
    wide_step: float = 388
    wide_check: float = 2 * 16 * 350 + 2100
    wide_chunk: float = 350
    loop: Mapping[str, float] = field(
        default_factory=lambda: {
            "resident 64": 708, "resident 128": 2429, "tiled": 727, "advance": 2443,
            "resident 64, six": 568, "resident 128, six": 1279, "tiled, six": 649,
            "advance, six": 651, "increment": 121, "six": 272,
        }
    )  # fmt: skip
    shared: Mapping[str, int] = field(
        default_factory=lambda: {
            "resident": 147_456, "resident, six": 196_608, "blocks": 49_152, "wide": 196_608,
            "tiled": 54_272, "tiled, six": 131_328, "advance": 82_944, "advance, six": 131_328,
            "increment": 131_072, "six": 106_496,
        }
    )  # fmt: skip
    registers: Mapping[str, int] = field(
        default_factory=lambda: {
            "resident": 128, "resident, six": 255, "blocks": 255, "wide": 255, "tiled": 255,
            "tiled, six": 255, "advance": 202, "advance, six": 252, "increment": 220, "six": 186,
        }
    )  # fmt: skip


COUNTS = Counts()
_SHARED, _REGISTERS, _WARPS = 233_472, 65_536, 64
"""What a multiprocessor has: bytes of shared memory, registers, warps."""
GAP = 110.0
"""Clocks at which no unit is busy in a step, whoever shares the multiprocessor."""
_LATENCY = 135.0
"""Clocks between an instruction of tensor cores and the use of its result, and of a barrier."""
_SERIAL = 560.0
"""Clocks of the elementwise part that a product of six parts waits for."""
_FFMA_LATENCY = 300.0
"""Clocks of latency and barriers per step of the kernels outside the tensor cores."""
_TILE_SHARE = 0.8
"""The share of the bound that loops over tiles reach."""
_FFMA_SHARE = 0.9
"""The same where the bound is issue slots."""
_EPILOGUE = 1700.0
"""Clocks before the first and after the last product of a tile."""
_LAUNCH = 2.8
"""Microseconds from a kernel's end to the next one's first instruction, on the device."""
_CHECK_PASSES = 8
"""Passes of four bytes per element over memory at a check of the kernels launched per step."""
_UNFUSED_PASSES = 16


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a step (or a check) costs.

    Attributes:
        kernel: its name.
        rows, programs, per_sm, waves: how the batch is cut, as the file's docstring says.
        clocks: of each unit of a multiprocessor, for one program.
        instructions: of a warp.
        bytes: through memory, all programs.
        operations: useful ones in full precision, all programs.
        microseconds: of all programs.
        bound: the unit that is busy longest.
    """

    kernel: str
    rows: int
    programs: int
    per_sm: int
    waves: int
    clocks: Mapping[str, float]
    instructions: float
    bytes: float
    operations: float
    microseconds: float
    bound: str


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A solve: `products` of the kind `step` and `checks` of the kind `check`, microseconds."""

    design: Design
    n: int
    batch: int
    products: float
    checks: float
    step: Cost
    check: Cost

    @property
    def microseconds(self) -> float:
        """Time on the device."""
        return self.products * self.step.microseconds + self.checks * self.check.microseconds


def predict(
    design: Design,
    n: int,
    batch: int,
    *,
    steps: float = STEPS,
    checks: float = CHECKS,
    chip: Chip = H100,
    counts: Counts = COUNTS,
) -> Prediction:
    """Predict a solve of n units in float32.

    Args:
        design: one of the file's docstring.
        n: units.
        batch: samples.
        steps: of the iteration.
        checks: of the residual.
        chip: where it runs.
        counts: of the compiled loops.
    """
    step = _COSTS[design](n, batch, chip, counts)
    if design == "increments":
        return Prediction(
            design=design, n=n, batch=batch, products=max(0.0, steps - checks), checks=checks,
            step=step, check=_exact_check(n, batch, chip, counts),
        )  # fmt: skip
    check = step
    if design == "unfused":
        check = replace(
            step, bytes=step.bytes + 4.0 * _UNFUSED_PASSES * n * batch,
            microseconds=_product(n, batch, chip) + chip.stream(4 * _UNFUSED_PASSES * n * batch),
        )  # fmt: skip
    return Prediction(  # one product more: the shift
        design=design, n=n, batch=batch, products=steps + 1, checks=checks, step=step, check=check
    )


def occupancy(kernel: str, warps: int, counts: Counts) -> int:
    """Return how many programs of a kernel a multiprocessor holds at a time."""
    shared = counts.shared[kernel] + 1024
    registers = 32 * warps * 8 * math.ceil(counts.registers[kernel] / 8)
    return max(1, min(_SHARED // shared, _REGISTERS // registers, _WARPS // warps))


def _on_chip(
    kernel: str, n: int, batch: int, chip: Chip, *, rows: int, per_sm: int,
    clocks: Mapping[str, float], latency: float, instructions: float, bytes: float = 0.0,
) -> Cost:  # fmt: skip
    """Return the cost of a step of a kernel that is launched once per solve."""
    programs = math.ceil(batch / rows)
    together = min(per_sm, math.ceil(programs / chip.multiprocessors))
    waves = math.ceil(programs / (chip.multiprocessors * per_sm))
    bound = max(clocks, key=clocks.__getitem__)
    wave = max(together * clocks[bound] + GAP, latency)
    name = bound if wave > latency or latency < 1.2 * clocks[bound] else "latency"
    return Cost(
        kernel=kernel, rows=rows, programs=programs, per_sm=per_sm, waves=waves, clocks=clocks,
        instructions=instructions, bytes=bytes, operations=2.0 * n * n * batch,
        microseconds=1e6 * waves * wave / chip.clock, bound=name,
    )  # fmt: skip


def _in_tiles(
    kernel: str, n: int, batch: int, chip: Chip, *, counts: Counts, tile: tuple[int, int, int],
    clocks: Mapping[str, float], share: float, bytes: float,
) -> Cost:  # fmt: skip
    """Return the cost of one launch of a product in tiles of rows × units × depth, 8 warps."""
    rows, units, depth = tile
    programs = math.ceil(batch / rows) * math.ceil(n / units)
    per_sm = occupancy(kernel, 8, counts)
    waves = math.ceil(programs / (chip.multiprocessors * per_sm))
    together = min(per_sm, math.ceil(programs / chip.multiprocessors))
    bound = max(clocks, key=clocks.__getitem__)
    wave = math.ceil(n / depth) * together * clocks[bound] / share + _EPILOGUE
    seconds, stream = 1e6 * waves * wave / chip.clock, chip.stream(bytes)
    return Cost(
        kernel=kernel, rows=rows, programs=programs, per_sm=per_sm, waves=waves, clocks=clocks,
        instructions=counts.loop[kernel], bytes=bytes, operations=2.0 * n * n * batch,
        microseconds=max(seconds, stream) + _LAUNCH, bound="memory" if stream > seconds else bound,
    )  # fmt: skip


def _now(n: int, batch: int, chip: Chip, counts: Counts) -> Cost:
    if n <= 128:
        units = max(16, 1 << (n - 1).bit_length())
        instructions = counts.loop["resident 128" if units > 64 else "resident 64"]
        clocks = {
            "FFMA": 1.015 * 32 * units * units / chip.ffma,
            "issue": instructions * 8 / chip.issue,
            # Every warp reads all of M, 16 bytes a thread, and its rows by broadcast.
            "shared memory": 32 * units * units * 1.257 / chip.shared,
        }
        return _on_chip(
            "resident", n, batch, chip, rows=32, per_sm=1, clocks=clocks,
            latency=max(clocks.values()) + _FFMA_LATENCY, instructions=instructions,
        )  # fmt: skip
    if n <= 512:
        tiles = math.ceil(n / 128) * math.ceil(n / 32)
        clocks = {
            "FFMA": tiles * 1040 / _FFMA_SHARE,
            "issue": tiles * counts.loop["tiled"] * 8 / chip.issue / _FFMA_SHARE,
            "shared memory": tiles * 1360 / _FFMA_SHARE,
        }
        return _on_chip(
            "tiled", n, batch, chip, rows=32, per_sm=1, clocks=clocks,
            latency=max(clocks.values()) + _FFMA_LATENCY, instructions=counts.loop["tiled"],
        )  # fmt: skip
    clocks = {"FFMA": 4136, "issue": counts.loop["advance"] * 8 / chip.issue, "shared memory": 2050}
    return _in_tiles(
        "advance", n, batch, chip, counts=counts, tile=(128, 128, 32), clocks=clocks, share=1.0,
        bytes=12.0 * n * batch + 4 * n * n,
    )  # fmt: skip


def _stage_1(n: int, batch: int, chip: Chip, counts: Counts) -> Cost:
    if n <= 128:
        units = max(16, 1 << (n - 1).bit_length())
        instructions = counts.loop[f"resident {128 if units > 64 else 64}, six"]
        tensor = 6 * 64 * units * units / chip.bf16
        return _on_chip(
            "resident, six", n, batch, chip, rows=64, per_sm=1, instructions=instructions,
            clocks={"tensor cores": tensor, "issue": instructions * 4 / chip.issue},
            latency=tensor + _SERIAL,
        )  # fmt: skip
    tile = {"tensor cores": 3 * 128 * 128 * 32 / chip.tf32}
    if n <= 512:
        tiles = math.ceil(n / 128) * math.ceil(n / 32) / _TILE_SHARE
        issue = counts.loop["tiled, six"] * 8 / chip.issue
        clocks = {"tensor cores": tiles * tile["tensor cores"], "issue": tiles * issue}
        return _on_chip(
            "tiled, six", n, batch, chip, rows=128, per_sm=1, clocks=clocks,
            latency=max(clocks.values()), instructions=counts.loop["tiled, six"],
        )  # fmt: skip
    tile["issue"] = counts.loop["advance, six"] * 8 / chip.issue
    return _in_tiles(
        "advance, six", n, batch, chip, counts=counts, tile=(128, 128, 32), clocks=tile,
        share=_TILE_SHARE, bytes=12.0 * n * batch + 4 * n * n,
    )  # fmt: skip


def _blocks(n: int) -> int:
    """Return the units of the two blocks that n units are cut into."""
    return next(a + b for a, b in _PAIRS if a + b >= n)


_PAIRS = ((16, 16), (32, 16), (32, 32), (64, 16), (64, 32), (64, 64))


def _between(counts: Mapping[int, float], units: int) -> float:
    """Return the count for this many units, straight between its neighbours and through zero."""
    known = sorted(counts)
    above = next((u for u in known if u >= units), known[-1])
    below = max((u for u in known if u < above), default=0)
    low, high = counts.get(below, 0.0), counts[above]
    return low + (high - low) * (units - below) / (above - below)


def _six(n: int, batch: int, chip: Chip, counts: Counts) -> Cost:
    if n <= 128:
        units = _blocks(n)
        tensor = 6 * 64 * units * units / chip.bf16
        instructions = 10.0 * units
        return _on_chip(
            "blocks", n, batch, chip, rows=64, per_sm=occupancy("blocks", 4, counts),
            clocks={"tensor cores": tensor, "issue": instructions * 4 / chip.issue},
            latency=tensor + _SERIAL, instructions=instructions,
        )  # fmt: skip
    if n <= 256:
        units = 64 * math.ceil(n / 64)
        instructions = counts.wide_chunk * 16 * (units / 256) ** 2
        clocks = {
            "tensor cores": 6 * 64 * units * units / chip.bf16,
            "issue": instructions * 8 / chip.issue,
            "second cache": 6.0 * units * units / chip.second_cache,
        }
        return _on_chip(
            "wide", n, batch, chip, rows=64, per_sm=2, clocks=clocks, instructions=instructions,
            latency=clocks["second cache"] + instructions,
        )  # fmt: skip
    return _in_tiles(
        "six", n, batch, chip, counts=counts,
        tile=(128, 128, 32), share=_TILE_SHARE, bytes=12.0 * n * batch + 6 * n * n,
        clocks={
            "tensor cores": 6 * 128 * 128 * 32 / chip.bf16,
            "issue": counts.loop["six"] * 8 / chip.issue,
        },
    )  # fmt: skip


def _increments(n: int, batch: int, chip: Chip, counts: Counts) -> Cost:
    if n <= 256:
        narrow = n <= 128
        units = _blocks(n) if narrow else 64 * math.ceil(n / 64)
        instructions = _between(counts.step, units) if narrow else counts.wide_step * units / 256
        warps, kernel = (4, "blocks") if narrow else (8, "wide")
        tensor = 64 * units * units / chip.bf16
        return _on_chip(
            kernel, n, batch, chip, rows=64, per_sm=occupancy(kernel, warps, counts),
            clocks={"tensor cores": tensor, "issue": instructions * warps / chip.issue},
            latency=tensor + instructions + _LATENCY, instructions=instructions,
        )  # fmt: skip
    return _in_tiles(
        "increment", n, batch, chip, counts=counts, tile=(128, 128, 64), share=_TILE_SHARE,
        bytes=12.0 * n * batch + 2 * n * n,
        clocks={
            "tensor cores": 128 * 128 * 64 / chip.bf16,
            "issue": counts.loop["increment"] * 8 / chip.issue,
        },
    )  # fmt: skip


def _exact_check(n: int, batch: int, chip: Chip, counts: Counts) -> Cost:
    """Return the cost of a check of `increments`: the residual's product and that of the base."""
    if n > 256:
        product = _six(n, batch, chip, counts)
        passes = 4.0 * _CHECK_PASSES * n * batch
        return replace(
            product, bytes=2 * product.bytes + passes, operations=2 * product.operations,
            microseconds=2 * product.microseconds + chip.stream(passes),
        )  # fmt: skip
    narrow = n <= 128
    units = _blocks(n) if narrow else 64 * math.ceil(n / 64)
    instructions = (
        _between(counts.check, units) if narrow else counts.wide_check * (units / 256) ** 2
    )
    warps, kernel = (4, "blocks") if narrow else (8, "wide")
    tensor = 12 * 64 * units * units / chip.bf16
    clocks = {"tensor cores": tensor, "issue": instructions * warps / chip.issue}
    cost = _on_chip(
        kernel, n, batch, chip, rows=64, per_sm=occupancy(kernel, warps, counts), clocks=clocks,
        latency=max(clocks.values()) + GAP, instructions=instructions,
    )  # fmt: skip
    return replace(cost, operations=2 * cost.operations)


def _product(n: int, batch: int, chip: Chip) -> float:
    """Return the microseconds of the library's float32 product with its addition."""
    count = 12 * n * batch + 4 * n * n
    return max(2e6 * n * n * batch / chip.sgemm, chip.stream(count))


def _unfused(n: int, batch: int, chip: Chip, counts: Counts) -> Cost:
    count = 28.0 * n * batch + 4 * n * n  # a copy, |x| in place, and the product with its addition
    product = _product(n, batch, chip)
    stream = chip.stream(16 * n * batch)
    seconds = max(product + stream, 3 * _LAUNCH)
    bound = (
        "launches" if seconds > product + stream else "library" if product > stream else "memory"
    )
    return Cost(
        kernel="library", rows=batch, programs=1, per_sm=1, waves=1, clocks={}, instructions=0.0,
        bytes=count, operations=2.0 * n * n * batch, microseconds=seconds, bound=bound,
    )  # fmt: skip


_COSTS = {
    "now": _now, "stage 1": _stage_1, "six": _six, "increments": _increments, "unfused": _unfused,
}  # fmt: skip


def floor(n: int, batch: int, per_clock: float, chip: Chip = H100) -> float:
    """Return the microseconds of n²·batch multiply-adds at a rate per clock and multiprocessor."""
    return 2e6 * n * n * batch / chip.rate(per_clock)


def ratio_unfused(
    n: int, batch: int = 65536, design: Design = "increments", chip: Chip = H100,
    counts: Counts = COUNTS, host: float = HOST,
) -> float:  # fmt: skip
    """Return how many times the unfused loop takes as long as a design, each with its host."""
    own = predict(design, n, batch, chip=chip, counts=counts).microseconds
    other = predict("unfused", n, batch, chip=chip, counts=counts).microseconds
    return (other + host) / (own + host)


def counted(rows: Iterable[Mapping[str, Any]], counts: Counts = COUNTS) -> Counts:
    """Return the counts with those of compiled kernels in place of the ones for their kernel.

    Read are the float32 solves with ReLU for sm_90. A kernel of a launch per step is known by its
    name; what else has a product loop on tensor cores is the step of the kernel for its n.

    Args:
        rows: of `benchmarks.gpu_compiled.rows`; what they do not name stays.
        counts: what else is known.
    """
    loop, shared, registers = dict(counts.loop), dict(counts.shared), dict(counts.registers)
    step, wide_step = dict(counts.step), counts.wide_step
    for row in rows:
        name, case = row["kernel"], row["case"]
        units = re.match(r"(?:increment )?n=(\d+) float32 (?:PeacemanRachford )?ReLU", case)
        loops = [found for found in row.get("loops") or () if found["product"]]
        if row.get("error") or row["target"] != "sm_90" or units is None or not loops:
            continue
        n, shortest = int(units[1]), min(loops, key=lambda found: found["instructions"])
        if name in loop:
            loop[name] = shortest["instructions"]
        elif shortest["tensor_core"] and n <= 128:
            step[_blocks(n)] = shortest["instructions"]
        elif shortest["tensor_core"] and n <= 256:
            wide_step = shortest["instructions"] * 256 / (64 * math.ceil(n / 64))
        if name in shared:
            shared[name], registers[name] = row["shared"], row["registers"]
    return replace(
        counts, loop=loop, shared=shared, registers=registers, step=step, wide_step=wide_step
    )


def table(
    sizes: Sequence[int] = SIZES,
    batches: Sequence[int] = BATCHES,
    *,
    designs: Sequence[Design] = get_args(Design),
    steps: float = STEPS,
    checks: float = CHECKS,
    chip: Chip = H100,
    counts: Counts = COUNTS,
) -> list[dict[str, Any]]:
    """Return a row per cell and design; times in microseconds on the device."""
    rows = []
    for n in sizes:
        for batch in batches:
            for design in designs:
                found = predict(
                    design, n, batch, steps=steps, checks=checks, chip=chip, counts=counts
                )
                rows.append(
                    {
                        "n": n, "batch": batch, "design": design, "kernel": found.step.kernel,
                        "bytes of a step": found.step.bytes,
                        "operations": found.step.operations,
                        "instructions": found.step.instructions,
                        "programs": found.step.programs, "per SM": found.step.per_sm,
                        "waves": found.step.waves, "bound": found.step.bound,
                        "step, µs": found.step.microseconds,
                        "check, µs": found.check.microseconds,
                        "solve, µs": found.microseconds,
                        "of float32": floor(n, batch, chip.ffma, chip) / found.step.microseconds,
                        "of bfloat16 / 6":
                            floor(n, batch, chip.bf16 / 6, chip) / found.step.microseconds,
                    }
                )  # fmt: skip
    return rows


def main() -> None:
    """Print the table."""
    from benchmarks.gpu_record import markdown

    options = argparse.ArgumentParser(description="predicted times of solves on a GPU")
    options.add_argument("--chip", choices=("H100", "H200"), default="H100")
    options.add_argument("--steps", type=float, default=STEPS)
    options.add_argument("--checks", type=float, default=CHECKS)
    arguments = options.parse_args()
    print(
        markdown(table(steps=arguments.steps, checks=arguments.checks, chip=chip(arguments.chip)))
    )


if __name__ == "__main__":
    main()
