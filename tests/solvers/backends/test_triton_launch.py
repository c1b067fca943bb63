"""What a kernel that fails costs: one warning, and nothing that PyTorch cannot do."""

import subprocess
import warnings

import pytest
import torch

from solvers.backends import triton_launch as launch
from solvers.backends.triton_launch import (
    KernelWarning,
    forget_failures,
    has_triton,
    try_launch,
)


@pytest.fixture(autouse=True)
def forgotten():
    forget_failures()
    yield
    forget_failures()


class TritonError(Exception):
    """Named as Triton's own, which need not be installed."""


class CompilationError(TritonError):
    pass


class OutOfResources(TritonError):
    pass


class InterpreterError(TritonError):
    pass


class Kernel:
    """A kernel that raises errors in turn, None for a launch."""

    __name__ = "example"

    def __init__(self, *errors):
        self.errors, self.launches = list(errors), []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append((grid, arguments, options))
            error = self.errors.pop(0) if self.errors else None
            if error is not None:
                raise error

        return launch


X = torch.zeros(3)
FAILURES = [
    CompilationError("at 3:4:\n  x = _\n      ^\nloop-carried variable _ has type int32"),
    OutOfResources("out of resource: shared memory, Required: 278528, Hardware limit: 232448"),
    RuntimeError("PassManager::run failed"),
    OSError("cannot write to the cache"),
    subprocess.CalledProcessError(1, ["gcc"]),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
def test_a_failure_is_told_once_and_stays(error):
    kernel = Kernel(error)
    with pytest.warns(KernelWarning, match=r"kernel example does not run on cpu .*PyTorch takes"):
        reason = try_launch(kernel, (2,), X, 5, SIZE=16)
    assert reason.startswith(type(error).__name__)
    assert str(error).splitlines()[-1] in reason
    for _ in range(3):
        assert try_launch(kernel, (7,), X, 6, SIZE=16) == reason
    assert len(kernel.launches) == 1
    forget_failures()
    assert try_launch(kernel, (2,), X, 5, SIZE=16) is None


def test_the_reason_is_the_causes_and_no_caret():
    error = CompilationError("at 3:4:\n  x = y\n      ^")
    with pytest.warns(KernelWarning, match="CompilationError: x = y"):
        try_launch(Kernel(error), (1,), X)
    error.__cause__ = ValueError("y is no tensor")
    with pytest.warns(KernelWarning, match="CompilationError: y is no tensor"):
        try_launch(Kernel(error), (1,), X)


def test_launches_are_what_was_asked_for_with_fused_multiplications():
    kernel = Kernel()
    assert try_launch(kernel, (2, 3), X, 5, SIZE=16, num_warps=4) is None
    options = {"SIZE": 16, "num_warps": 4, "enable_fp_fusion": True}
    assert kernel.launches == [((2, 3), (X, 5), options)]


def test_other_options_and_dtypes_are_tried_but_not_told_again():
    kernel = Kernel(OutOfResources("too much"), OutOfResources("too much"), None, OSError("other"))
    with pytest.warns(KernelWarning):
        assert try_launch(kernel, (1,), X, SIZE=64)
    assert try_launch(kernel, (1,), X.double(), SIZE=64) == "OutOfResources: too much"
    assert try_launch(kernel, (1,), X, SIZE=16) is None
    with pytest.warns(KernelWarning, match="OSError: other"):
        assert try_launch(kernel, (1,), X, SIZE=32)
    assert len(kernel.launches) == 4


@pytest.mark.parametrize(
    "error",
    [
        TypeError("unexpected keyword"), ValueError("cannot be accessed from Triton (cpu tensor?)"),
        torch.OutOfMemoryError("CUDA out of memory"), InterpreterError("IndexError"), KeyError("x"),
        AssertionError("shapes"),
    ],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_errors_of_arguments_memory_and_interpreter_are_raised(error):
    kernel = Kernel(error)
    with pytest.raises(type(error)):
        try_launch(kernel, (1,), X)
    assert try_launch(kernel, (1,), X) is None  # and not remembered


def test_errors_after_a_first_launch_are_raised_unless_the_compiler_is_asked_again():
    kernel = Kernel(None, RuntimeError("an illegal memory access"), None, CompilationError("new"))
    assert try_launch(kernel, (1,), X) is None
    with pytest.raises(RuntimeError, match="illegal memory"):
        try_launch(kernel, (1,), X)
    assert try_launch(kernel, (1,), X) is None
    with pytest.warns(KernelWarning, match="CompilationError: new"):
        assert try_launch(kernel, (1,), X)


def test_where_warnings_are_errors_the_failure_is_remembered_all_the_same():
    kernel = Kernel(OSError())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KernelWarning, match="no message"):
            try_launch(kernel, (1,), X)
        assert try_launch(kernel, (1,), X) == "OSError: no message"


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: entered.append(device) or launch.nullcontext()
    )
    for name in ("cpu", "cuda:0", "cuda:1"):
        with launch._on(torch.device(name)):
            pass
    assert entered == [torch.device("cuda:1")]


def test_triton_is_looked_for_once(monkeypatch):
    looks = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: looks.append(name))
    has_triton.cache_clear()
    assert not has_triton()
    assert not has_triton()
    assert looks == ["triton"]
    has_triton.cache_clear()
