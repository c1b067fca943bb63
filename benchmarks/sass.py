"""What does each loop of a compiled CUDA kernel consist of?

The machine code of a cubin is read with the disassembler that Triton brings along, cut into basic
blocks, and counted loop by loop.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

_LINE = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(.*?)\s*;")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_TENSOR_CORE = re.compile(r"^(?:[HDIQBO]G?MMA|UTC\w*MMA)\b")


@dataclass(frozen=True)
class Instruction:
    """One line of machine code: where it lies, what it does, whether always, and where it jumps."""

    address: int
    name: str
    conditional: bool
    target: int | None


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The instructions of one loop, those of the loops inside it included.

    Attributes:
        start: address of its first instruction.
        instructions: how many there are.
        tensor_core: those of the tensor cores (HMMA, HGMMA, DMMA, IMMA, UTC…MMA).
        tensor_core_names: their distinct names.
        ffma: multiply-adds of float32 and of pairs of it.
        dfma: multiply-adds of float64.
        local_loads: loads of spilled registers.
        local_stores: stores of spilled registers.
        shared_loads: loads from shared memory, of matrices included.
        shared_stores: stores to shared memory, of matrices included.
        skip: addresses between which its longest jump forward passes over instructions, and how
            many they are.
        innermost: whether no other loop lies in it.
        product: whether it is the innermost loop that multiplies and accumulates.
    """

    start: int
    instructions: int
    tensor_core: int
    tensor_core_names: tuple[str, ...]
    ffma: int
    dfma: int
    local_loads: int
    local_stores: int
    shared_loads: int
    shared_stores: int
    skip: tuple[int, int, int]
    innermost: bool
    product: bool


def resources(cubin: bytes, tools: Path) -> dict[str, Any]:
    """Return registers and bytes of stack per thread, and the loops, of a kernel's cubin."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file)
        code = _output(tools / "cuobjdump", "-sass", file)
    found = _USAGE.findall(usage)
    assert found, f"cuobjdump names no registers: {usage}"
    functions = [parse(part) for part in code.split("Function :")[1:]]
    names = {one.name for function in functions for one in function}
    return {
        "registers": max(int(registers) for registers, _ in found),
        "stack": max(int(stack) for _, stack in found),
        "instructions": sum(map(len, functions)),
        "tensor_core_names": sorted(filter(_TENSOR_CORE.match, names)),
        "loops": [asdict(loop) for function in functions for loop in loops(function)],
    }


def parse(code: str) -> list[Instruction]:
    """Return the instructions in a listing of `cuobjdump -sass`."""
    found = []
    for line in code.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        words = match[2].split()
        predicate = words.pop(0) if words[0].startswith("@") else None
        target = None
        if words[0].split(".")[0] == "BRA":
            target = int(re.findall(r"0x[0-9a-f]+", match[2])[-1], 16)
        # A branch may also be taken by a predicate among its operands: BRA.U !UP0, 0x10.
        conditional = predicate is not None or (target is not None and len(words) > 2)
        found.append(Instruction(int(match[1], 16), words[0], conditional, target))
    return found


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """Return the loops, outer ones before those inside them."""
    blocks, follow = _blocks(instructions)
    bodies = list(_nest(_reached(follow), follow))
    inside = [[one for block in sorted(body) for one in blocks[block]] for body in bodies]
    counts = [_count(body) for body in inside]
    # In a kernel with tensor cores the other multiply-adds are of vectors.
    has_products = any(count["tensor_core"] for count in counts)
    multiplies = [
        count["tensor_core"] if has_products else count["ffma"] + count["dfma"] for count in counts
    ]
    found = []
    for body, own, count, multiply in zip(bodies, inside, counts, multiplies, strict=True):
        inner = [n for other, n in zip(bodies, multiplies, strict=True) if other < body]
        innermost, product = not inner, multiply > 0 and not any(inner)
        found.append(
            Loop(
                start=own[0].address, skip=_longest_skip(own), innermost=innermost,
                product=product, **count,
            )
        )  # fmt: skip
    return found


def _longest_skip(body: Sequence[Instruction]) -> tuple[int, int, int]:
    addresses = [one.address for one in body]
    skips = [(0, 0, 0)]
    for one in body:
        if one.target is not None and one.target > one.address and one.target in addresses:
            passed = addresses.index(one.target) - addresses.index(one.address) - 1
            skips.append((one.address, one.target, passed))
    return max(skips, key=lambda skip: skip[2])


def _blocks(
    instructions: Sequence[Instruction],
) -> tuple[list[list[Instruction]], dict[int, list[int]]]:
    """Cut code into blocks without jumps, and say which blocks follow which."""
    starts = {instructions[0].address} if instructions else set()
    for one, after in pairwise(instructions):
        if one.target is not None:
            starts |= {one.target, after.address}
        elif _ends(one):
            starts.add(after.address)
    blocks: list[list[Instruction]] = []
    for instruction in instructions:
        if instruction.address in starts:
            blocks.append([])
        blocks[-1].append(instruction)
    index = {block[0].address: number for number, block in enumerate(blocks)}
    follow: dict[int, list[int]] = {}
    for number, block in enumerate(blocks):
        last = block[-1]
        follow[number] = [index[last.target]] if last.target in index else []
        falls = last.conditional or (last.target is None and not _ends(last))
        if falls and number + 1 < len(blocks):
            follow[number].append(number + 1)
    return blocks, follow


def _ends(instruction: Instruction) -> bool:
    return instruction.name.split(".")[0] in ("EXIT", "RET", "BRX", "JMP", "KILL")


def _reached(follow: Mapping[int, Sequence[int]]) -> set[int]:
    """Return the blocks that are run: not the jumps to themselves that stand behind the code."""
    found: set[int] = set()
    left = [0] if follow else []
    while left:
        block = left.pop()
        if block not in found:
            found.add(block)
            left += follow[block]
    return found


def _nest(nodes: Collection[int], follow: Mapping[int, Sequence[int]]) -> Iterator[frozenset[int]]:
    """Yield loops as sets of blocks: what can reach itself, and again without the way in.

    A loop may be entered at several places (Steensgaard 1993): one that solves and checks in turn
    is also entered at its check where there is nothing to solve.
    Two loops that begin with the same block are one here.
    """
    for body in _components(nodes, follow):
        yield body
        outside = {target for node in set(follow) - body for target in follow[node]} | {0}
        inner = {
            node: [target for target in targets if node not in body or target not in outside]
            for node, targets in follow.items()
        }
        yield from _nest(body, inner)


def _components(
    nodes: Collection[int], follow: Mapping[int, Sequence[int]]
) -> list[frozenset[int]]:
    """Return the strongly connected components that hold a loop, in order (Kosaraju)."""
    order: list[int] = []
    seen: set[int] = set()
    for root in sorted(nodes):
        left = [(root, False)]
        while left:
            node, is_done = left.pop()
            if is_done:
                order.append(node)
            elif node in nodes and node not in seen:
                seen.add(node)
                left += [(node, True), *((target, False) for target in follow[node])]
    before: dict[int, list[int]] = {node: [] for node in nodes}
    for node in nodes:
        for target in follow[node]:
            if target in before:
                before[target].append(node)
    found, taken = [], set()
    for root in reversed(order):
        body, rest = set(), [root]
        while rest:
            node = rest.pop()
            if node not in taken:
                taken.add(node)
                body.add(node)
                rest += before[node]
        if len(body) > 1 or (body and root in follow[root]):
            found.append(frozenset(body))
    return sorted(found, key=min)


def _count(body: Sequence[Instruction]) -> dict[str, Any]:
    names = [instruction.name for instruction in body]
    stems = [name.split(".")[0] for name in names]
    tensor_core = [name for name in names if _TENSOR_CORE.match(name)]
    return {
        "instructions": len(body),
        "tensor_core": len(tensor_core),
        "tensor_core_names": tuple(sorted(set(tensor_core))),
        "ffma": sum(stem in ("FFMA", "FFMA2") for stem in stems),
        "dfma": stems.count("DFMA"),
        "local_loads": stems.count("LDL"),
        "local_stores": stems.count("STL"),
        "shared_loads": sum(stem in ("LDS", "LDSM") for stem in stems),
        "shared_stores": sum(stem in ("STS", "STSM") for stem in stems),
    }


def _output(*command: object) -> str:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=True
    ).stdout
