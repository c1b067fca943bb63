"""Shares of a batch, and two processes that reach what one reaches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lben import checkpoints, parallel
from lben.parallel import Processes, is_first, processes

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_make_up_the_batch(count):
    batch = torch.arange(22).reshape(11, 2)
    shares = [Processes(device=CPU, rank=r, count=count).share(batch) for r in range(count)]
    assert torch.equal(torch.cat(shares), batch)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


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
        assert torch.equal(team.total(value), torch.ones(3))
        with team.in_turn(), parallel.unsynchronised(model):
            team.wait()


def test_only_the_first_process_speaks(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert is_first() == (rank == 0)


def lben(words, processes=1):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), "-m", "lben", *words],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


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
