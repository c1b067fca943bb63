"""Compile the pointwise kernels for a GPU that is not here.

    env -u TRITON_INTERPRET python -m tests.solvers.ahead_of_time ARCH [--full]

In a process of its own: a kernel is interpreted or compiled from its import on, and the suite
interprets. A driver that only names its target makes launches bind and specialise their arguments
as on the device. Here a launch ends after the front end, or with --full after ptxas, where shared
memory is held against what a multiprocessor of this kind gives to one program.
"""

import itertools
import sys
import types

import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from solvers import DenseOperator, Inclusion, LeakyReLU, LinearSlope, ReLU, fused
from solvers.fused import launch, pointwise

SHARED = {80: 166912, 90: 232448}
"""Bytes that one program may have."""


class Compiler:
    """Compiles in place of launching, and counts."""

    def __init__(self, arch: int, full: bool) -> None:
        self.target, self.full, self.limit = GPUTarget("cuda", arch, 32), full, SHARED[arch]
        self.compiled = 0
        self.failures: list[str] = []
        compiler = self

        def compile_only(kernel, key, signature, device, constexprs, options, attrs, warmup):
            cache, _, _, backend, _ = kernel.device_caches[device]
            source = kernel.ASTSource(kernel, signature, constexprs, attrs)
            try:
                compiler.compile(kernel, source, options, backend)
            except Exception as error:
                reason = launch._line(error)
                compiler.failures.append(f"{kernel.__name__} {constexprs}: {reason}")
            cache[key] = types.SimpleNamespace()
            return cache[key]

        driver.set_active(
            types.SimpleNamespace(
                get_current_target=lambda: self.target,
                get_current_device=lambda: 0,
                get_current_stream=lambda device=None: 0,
            )
        )
        JITFunction._do_compile = compile_only
        JITFunction.__getitem__ = lambda kernel, grid: (
            lambda *args, **options: kernel.run(*args, grid=grid, warmup=True, **options)
        )

    def compile(self, kernel, source, options, backend) -> None:
        self.compiled += 1
        if self.full:
            found = kernel.compile(source, target=self.target, options=options.__dict__)
            if found.metadata.shared > self.limit:
                raise RuntimeError(f"{found.metadata.shared} bytes of shared memory")
            return
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions = backend.get_codegen_implementation(options)
        source.make_ir(self.target, options, functions, backend.get_module_map(), context)


def launch_all(shapes: list[tuple[int, ...]], widths: list[int]) -> None:
    """Launch every kernel with every choice that it has."""
    pointwise.serves = lambda tensor: True
    dtypes, sigmas = (torch.float32, torch.float64), (ReLU(), LeakyReLU(0.1), None)
    for shape, dtype, sigma in itertools.product(shapes, dtypes, sigmas):
        u = torch.empty(shape, dtype=dtype, requires_grad=True)
        b, t, s = torch.empty(3, shape[1], dtype=dtype)
        t.requires_grad_()
        layouts = [u, u.to(memory_format=torch.channels_last)] if u.ndim == 4 else [u]
        for own, (bias, inner) in itertools.product(layouts, [(b, None), (None, None), (b, s)]):
            y = fused.activated(own, bias, t, sigma, inner=inner)
            for wanted in ((u, t), (u,)):
                torch.autograd.grad(y, wanted, torch.empty_like(y), retain_graph=True)
    for n, dtype, slopes in itertools.product(widths, dtypes, (False, True)):
        v = torch.empty(9, n, dtype=dtype)
        sigma = LinearSlope(torch.empty_like(v)) if slopes else LeakyReLU(0.1)
        problem = Inclusion(DenseOperator(torch.empty(n, n, dtype=dtype)), v, sigma)
        for alpha in (0.5, torch.ones(n, dtype=dtype)):
            fused.reflected_sum(problem, alpha, v)(v)


def main() -> None:
    arch, full = int(sys.argv[1]), "--full" in sys.argv
    compiler = Compiler(arch, full)
    if full:
        launch_all([(64, 80), (4, 16, 6, 5), (4096, 64, 8, 8)], [1, 5, 80])
    else:
        launch_all([(7, 5), (4, 16, 8, 8)], [5, 80])
    print(f"{compiler.compiled} compiled, {len(compiler.failures)} failed")
    print(*compiler.failures, sep="\n")
    sys.exit(bool(compiler.failures))


if __name__ == "__main__":
    main()
