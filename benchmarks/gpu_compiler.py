"""What comes of every specialisation that some launches ask for, on one target?

The process that compiles for `benchmarks.gpu_compiled`, which names cases, target and depth in a
file and finds one line of JSON per specialisation in another. It is a process of its own because
kernels are interpreted or compiled from their import, and because the compiler may abort.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget

from benchmarks.fake_driver import Specialisation, pretended
from benchmarks.sass import resources
from benchmarks.targets import SHARED_MEMORY, TENSOR_MEMORY

_DOT = re.compile(r"= tt\.dot(?:_scaled)? .*")
_PRECISION = re.compile(r"inputPrecision = (\w+)")
_OPERAND = re.compile(r": tensor<(?:\d+x)+(\w+)")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def main() -> None:
    """Compile what the file named by the first argument asks for, into that of the second."""
    order = json.loads(Path(sys.argv[1]).read_text())
    with Path(sys.argv[2]).open("a", encoding="utf-8") as out:

        def tell(**row: Any) -> None:
            print(json.dumps(row), file=out, flush=True)

        _Compiler(order, tell).run()


class _Compiler:
    """Runs cases and tells what became of each specialisation."""

    def __init__(self, order: dict[str, Any], tell: Callable[..., None]) -> None:
        self.full: bool = order["full"]
        self.known = set(order["known"])
        self.target_name: str = order["target"]
        self.target = target(order["target"])
        self.cases = importlib.import_module(order["cases"]).cases(order["full_cases"])
        labels: list[str] = order["labels"] or list(self.cases)
        size = -(-len(labels) // order["parts"])
        self.labels = labels[order["part"] * size : (order["part"] + 1) * size]
        self.tell = tell
        self.label = ""

    def run(self) -> None:
        """Run the cases one by one."""
        self.tell(labels=self.labels)
        with ExitStack() as stack:
            stack.enter_context(pretended(self.target, self.compile))
            # Whoever asks which device this is hears of the target.
            capability = divmod(self.target.arch, 10) if self.target.backend == "cuda" else (9, 4)
            stack.enter_context(
                mock.patch.object(torch.cuda, "get_device_capability", return_value=capability)
            )
            for label in self.labels:
                self.label = label
                try:
                    self.cases[label]()
                except Exception as error:
                    refused = type(error).__name__ == "Refused"
                    words = f"{'' if refused else type(error).__name__ + ': '}{_reason(error)}"
                    self.tell(case=label, kernel="", refused=refused, error=words)
                self.tell(done=label)

    def compile(self, asked: Specialisation) -> Any:
        """Compile one specialisation, whatever comes of it."""
        row: dict[str, Any] = {
            "kernel": asked.kernel, "case": self.label, "target": self.target_name,
            "triton": triton.__version__, "key": asked.key,
            "constants": {name: str(value) for name, value in asked.constants.items()},
            "signature": {name: str(kind) for name, kind in asked.signature.items()},
            "warps": getattr(asked.options, "num_warps", None), "refused": False, "error": None,
        }  # fmt: skip
        if asked.key in self.known:
            return None
        self.known.add(asked.key)
        self.tell(begun=row)
        metadata = None
        try:
            if self.full:
                metadata = self._whole(asked, row)
            else:
                row["dots"] = dots(_front_end(asked))
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {_reason(error)}"
        self.tell(**row)
        return metadata or SimpleNamespace(shared=0)

    def _whole(self, asked: Specialisation, row: dict[str, Any]) -> Any:
        """Compile down to machine code and count it."""
        compiled = asked.function.compile(
            asked.source(), target=asked.target, options=asked.options.__dict__
        )
        row["dots"] = dots(compiled.asm["ttir"])
        limit = SHARED_MEMORY[self.target_name]
        shared, tensor_memory = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", 0)
        row |= {"shared": shared, "shared_limit": limit, "tensor_memory": tensor_memory or 0}
        if self.target.backend == "cuda":
            row |= resources(compiled.asm["cubin"], _TOOLS)
        else:
            row |= _amd(compiled.asm["amdgcn"])
        if shared > limit:
            row["error"] = f"OutOfResources: {shared} bytes of shared memory, a block has {limit}"
        elif (tensor_memory or 0) > TENSOR_MEMORY:
            row["error"] = f"OutOfResources: {tensor_memory} columns of tensor memory"
        return compiled.metadata


def target(name: str) -> GPUTarget:
    """Return Triton's target for sm_90 and the like, or for gfx942 and the like."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


def _front_end(asked: Specialisation) -> str:
    """Return the first intermediate representation, before any optimisation."""
    context = ir.context()
    ir.load_dialects(context)
    asked.backend.load_dialects(context)
    implementation = asked.backend.get_codegen_implementation(asked.options)
    module = asked.source().make_ir(
        asked.target, asked.options, implementation, asked.backend.get_module_map(), context
    )
    return str(module)


def dots(code: str) -> list[str]:
    """Return the products of matrices in Triton's intermediate code: "f32 ieee", "bf16 ieee", …"""
    found = []
    for line in _DOT.findall(code):
        operand, precision = _OPERAND.search(line), _PRECISION.search(line)
        kind = operand[1] if operand else "?"
        found.append(f"{kind} {precision[1] if precision else 'ieee'}")
    return sorted(set(found))


def _amd(code: str) -> dict[str, Any]:
    """Return registers and bytes of stack per thread as AMD's assembler notes them."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        return int(found[1]) if found else 0

    return {
        "registers": number("vgpr_count"), "stack": number("private_segment_fixed_size"),
        "tensor_core_names": sorted(set(re.findall(r"\bv_mfma_\w+", code))), "loops": [],
    }  # fmt: skip


def _reason(error: BaseException) -> str:
    """Return the last line of the innermost cause: outer ones say where it was called."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # ptxas ends with its command; what is wrong stands in lines that say so.
    wrong = [line for line in lines if "error" in line.lower()]
    return (wrong or lines or [type(error).__name__])[-1][:400]


if __name__ == "__main__":
    main()
