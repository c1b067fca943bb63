"""Shares of a batch, and two processes that reach what one reaches."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lben import parallel
from lben.data import load
from lben.evaluation.accuracy import EvaluationConfig, evaluate
from lben.evaluation.proofs import CertificationConfig, evaluate_certificates
from lben.models import EquilibriumClassifierConfig
from lben.parallel import Processes, is_first, processes
from lben.training import checkpoints, train
from tests.lben.runs import equilibrium

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_make_up_the_batch(count):
    batch = torch.arange(22).reshape(11, 2)
    shares = [Processes(device=CPU, rank=r, count=count).share(batch) for r in range(count)]
    assert torch.equal(torch.cat(shares), batch)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_numbers_are_shared_as_batches_are(count):
    for total in range(12):
        teams = [Processes(device=CPU, rank=r, count=count) for r in range(count)]
        batch = torch.arange(total)
        assert [t.share_of(total) for t in teams] == [len(t.share(batch)) for t in teams]


def test_work_that_leaves_a_process_idle_is_refused():
    team, data = Processes(device=CPU, count=3), load("digits")
    model = EquilibriumClassifierConfig(
        shape=(1, 8, 8), classes=10, mean=(0.3,), std=(0.4,), hidden=4
    ).build()
    with pytest.raises(ValueError, match="samples = 2 cannot be shared by 3 processes: start fewe"):
        evaluate_certificates(model, data, CertificationConfig(samples=2), team)
    for name in ("attack_samples", "pairs", "ascent_pairs"):
        with pytest.raises(ValueError, match=f"{name} = 2 cannot be shared by 3 processes"):
            evaluate(model, data, replace(EvaluationConfig(), **{name: 2}), team)


def test_batches_that_leave_a_process_idle_are_refused():
    team = Processes(device=CPU, count=4)
    for samples, batch_size in ((100, 16), (96, 16), (5, 100)):
        team.check_batches(samples, batch_size)
    for samples, batch_size, smallest in ((99, 16, 3), (96, 3, 3), (2, 100, 2)):
        with pytest.raises(ValueError, match=f"leave a batch of {smallest} for 4 processes"):
            team.check_batches(samples, batch_size)


def test_alone_there_is_nothing_to_wait_for():
    assert is_first()
    with processes("cpu") as team:
        assert team == Processes(device=CPU)
        assert team.first
        model, value = nn.Linear(2, 2), torch.ones(3)
        assert team.replicate(model) is model
        assert team.gather(value) is value
        assert torch.equal(team.total(value), torch.ones(3))
        with team.in_turn(), parallel.without_synchronisation(model):
            team.wait()


def test_only_the_first_process_speaks(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert is_first() == (rank == 0)


def python(words, processes=1):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *words], cwd=ROOT, text=True,
        capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def lben(words, processes=1):
    return python(["-m", "lben", *words], processes)


GATHER = """
import torch
from lben.parallel import processes

for _ in range(2):  # one run may join twice
    with processes("cpu") as team:
        for dtype in (torch.float64, torch.int64, torch.bool):
            for total in (1, 2, 7):
                batch = torch.arange(6 * total).reshape(2, 3, total).T.to(dtype)
                found = team.gather(team.share(batch))
                assert found.dtype == dtype and torch.equal(found, batch)
        ranks = team.gather(torch.full((3 * team.rank,), team.rank))
        assert ranks.tolist() == [1] * 3 + [2] * 6

with processes("cpu") as team:
    if team.rank == 1:
        raise ValueError("a hard image")
    team.gather(torch.ones(1))
"""


@pytest.mark.slow
def test_unequal_shares_are_gathered_and_a_failure_ends_the_others(tmp_path):
    script = tmp_path / "gather.py"
    script.write_text(GATHER)
    start = time.perf_counter()
    done = python([str(script)], 3)
    assert done.returncode != 0
    assert "ValueError: a hard image" in done.stderr
    assert "AssertionError" not in done.stderr
    assert time.perf_counter() - start < 120  # without torchrun the others wait for days


TRAIN = (
    "train --epochs 2 --hidden 16 --batch-size 64 --lr 0.02 --tol 2e-6 --shift 1 --ema 0.9 "
    "optimizer:sgd"
)


@pytest.mark.slow
def test_two_processes_reach_what_one_reaches(tmp_path):
    """To 1e-5 of the largest weight: other orders of summation, and solves to 2e-6, in 46 steps."""
    runs = {}
    for count, extra in ((1, ""), (2, "--accumulate 2")):
        folder = tmp_path / str(count)
        done = lben([*TRAIN.split(), *extra.split(), "--out", str(folder)], count)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("test error") == 1
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        runs[count] = checkpoints.load_model(folder).state_dict(), metrics
    (alone, one), (shared, two) = runs[1], runs[2]
    for name, value in alone.items():
        assert (shared[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["train_error_percent"] == pytest.approx(b["train_error_percent"], abs=0.15)
    again = lben([*TRAIN.split(), "--out", str(folder)], 2)
    assert again.returncode != 0
    assert "already holds a run" in again.stderr


CERTIFY = "certify --samples 31 --radii 0.1 0.4 --attack-steps 5 --attack-restarts 1"
EVALUATE = (
    "evaluate --radii 0 0.2 0.5 --attack-samples 31 --pgd-steps 5 --pgd-restarts 1 --pairs 201 "
    "--ascent-pairs 5 --ascent-steps 5"
)


@pytest.mark.slow
def test_two_processes_certify_and_attack_what_one_does(tmp_path):
    """Exactly, as no attack starts at random; the pairs and their largest quotient are others."""
    folder = tmp_path / "run"
    train(equilibrium(out=str(folder), gamma=4.0, epochs=3, hidden=16, lr=0.02))
    found = {}
    for count in (1, 2):
        for words, file in ((CERTIFY, "certification.json"), (EVALUATE, "report.json")):
            done = lben([*words.split(), str(folder)], count)
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("violations") == 1
            found[count, file] = json.loads((folder / file).read_text())
            assert found[count, file].pop("environment")["processes"] == str(count)
    one, two = (found[count, "certification.json"] for count in (1, 2))
    assert all(report.pop("seconds") > 0 for report in (one, two))
    for method in (*one["methods"], *two["methods"]):
        assert method.pop("seconds") >= 0
        assert method.pop("seconds_per_image") >= 0
    for method in (*one["in_linf"], *two["in_linf"]):
        del method["seconds"], method["seconds_per_image"]
    assert one == two
    assert 0 < one["methods"][-1]["certified"][1] < one["methods"][-1]["certified"][0] < 1
    one, two = (found[count, "report.json"] for count in (1, 2))
    for name in ("quotient", "tightness"):
        assert one.pop(name) == pytest.approx(two.pop(name), rel=0.3)
    for name in ("seconds", "solver_steps", "max_logit_error"):
        assert 0.5 < one.pop(name) / two.pop(name) < 2
    assert two["pairs"] == 206
    assert one == two
    refused = lben(["certify", str(folder), "--samples", "1"], 2)
    assert refused.returncode != 0
    assert "lben: samples = 1 cannot be shared by 2 processes" in refused.stderr


@pytest.mark.slow
def test_two_processes_certify_any_model_as_one_does(tmp_path):
    torch.manual_seed(0)
    path, found = tmp_path / "model.pt", {}
    torch.save({"0.weight": torch.randn(6, 64) / 8, "0.bias": torch.randn(6),
                "1.weight": torch.randn(10, 6), "1.bias": torch.randn(10)}, path)  # fmt: skip
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        words = f"certify {path} --data digits --samples 31 --seconds 0 --radii 0.001 0.05"
        done = lben([*words.split(), "--out", str(out)], count)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("around each input") == 1
        found[count] = json.loads(out.read_text())
        assert found[count].pop("environment")["processes"] == str(count)
        for name in ("seconds", "seconds_per_sample", "bound_seconds"):
            assert found[count].pop(name) > 0
        assert found[count]["route"].pop("seconds") > 0
    assert found[1] == found[2]
