"""Kernels are built once and whole; without them every solve runs in PyTorch and says why."""

import subprocess
import sys

import pytest

from solvers import PeacemanRachford, solve
from solvers.native import build, library, status
from tests.problems import random_inclusion

pytestmark = pytest.mark.skipif(
    build().kernels is None, reason=f"no compiled kernels here: {status()}"
)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PATH": ""}, "no C\\+\\+ compiler found"),
        ({"CXX": "false"}, "no compiled kernels: .*false"),
        ({"CXX": "'false"}, "no compiled kernels: No closing quotation"),
        ({"CXX": "env false"}, "no compiled kernels: .*env false failed"),
        (
            {"CXX": "sh -c 'printf \\\\351 >&2; exit 1'"},
            "no compiled kernels: .*sh .*failed: \ufffd",
        ),
        ({"XDG_CACHE_HOME": "/proc/nowhere"}, "no compiled kernels: .*nowhere"),
    ],
)
def test_without_a_compiler_every_solve_runs_in_torch_and_says_so(
    environment, message, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = library.build.__wrapped__()
    assert result.kernels is None
    monkeypatch.setattr("solvers.backends.cpu.build", lambda: result)
    problem = random_inclusion()
    assert solve(problem).stats.loop == "torch"
    with pytest.raises(ValueError, match=f"demanded, but .*{message}"):
        solve(problem, PeacemanRachford(compiled=True))


def test_without_a_home_every_solve_runs_in_torch(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(library.Path, "home", no_home)
    assert library.build.__wrapped__().message.endswith(
        "no compiled kernels: Could not determine home directory."
    )


@pytest.mark.parametrize("size", [0, 100, 9000])
def test_a_damaged_library_is_built_again(size, tmp_path):
    code = "from solvers import native; print(native.status())"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "CXX": "env c++"}
    command = [sys.executable, "-c", code]
    for _ in range(2):
        output = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
        assert output.startswith(b"compiled kernels: ")
        (library,) = (tmp_path / "lben").iterdir()
        library.write_bytes(library.read_bytes()[:size])


def test_two_processes_may_build_at_once(tmp_path):
    code = "from solvers import native; print(native.status())"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in both:
        output, _ = process.communicate(timeout=120)
        assert output.startswith(b"compiled kernels: ")
    assert len(list((tmp_path / "lben").iterdir())) == 1


SLOW = {
    "main thread": "solve(problem, PeacemanRachford(), tol=1e-13, max_steps=10**9)",
    "backward": """
bias = (0 * problem.bias).requires_grad_()  # z = 0, and only the adjoint is hard
z = equilibrium(Inclusion(operator, bias, LeakyReLU(0.5)), PeacemanRachford(), tol=1e-13,
                max_steps=10**9).value
z.backward(problem.bias)
""",
    "other thread": """
thread = threading.Thread(
    target=lambda: solve(problem, PeacemanRachford(), tol=1e-13, max_steps=10**9), daemon=True)
thread.start()
thread.join()
""",
}


@pytest.mark.parametrize("where", SLOW)
@pytest.mark.parametrize(("n", "samples"), [(6, 40_000), (300, 1000)])
def test_ctrl_c_ends_a_solve_and_leaves_a_sane_state(where, n, samples):
    if build().kernels is None:
        pytest.skip("no compiled kernels")
    # A rotation by nearly nothing: the loop would run for ever.
    code = f"""
import os, signal, threading, time, warnings
import torch
from solvers import *
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
torch.manual_seed(0)
N = torch.randn({n}, {n}, dtype=torch.float64)
W = torch.eye({n}, dtype=torch.float64) * (1 - 1e-9) - 1e3 * (N - N.T)
operator = DenseOperator(W)
problem = Inclusion(operator, torch.randn({samples}, {n}, dtype=torch.float64), ReLU())
easy = Inclusion(DenseOperator(0 * W), problem.bias[:5], ReLU())
solve(easy, PeacemanRachford())
def interrupt():
    time.sleep(1.0)
    print("sent", time.time(), flush=True)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
warnings.simplefilter("ignore")
try:
    {SLOW[where].strip().replace(chr(10), chr(10) + "    ")}
except KeyboardInterrupt:
    print("caught", time.time(), flush=True)
    ok = solve(easy, PeacemanRachford(), on_failure="raise").converged
    print("sane", ok, flush=True)
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    words = dict(line.split() for line in done.stdout.splitlines())
    assert words.get("sane") == "True", done.stdout + done.stderr
    assert float(words["caught"]) - float(words["sent"]) < 3.0  # 0.1 s on an idle machine
