"""Proofs and proposals are the same numbers in every setting of torch."""

import contextlib
import math

import pytest
import torch

from lben import (
    EquilibriumConv2d,
    EquilibriumLinear,
    PooledEquilibriumConv2d,
    certify,
    margin_radius,
    tighten_diagonal,
    tighten_pairs,
    tighten_pooled,
    tighten_scaled,
)
from lben.certificates import IntervalClaim
from lben.radii.local import LocalCertifier, OperatingPoints
from lben.tightening import tighten_linf
from solvers import ReLU

torch.manual_seed(0)
DENSE, KERNELS, POOLED = (
    made.weights().apply(torch.Tensor.detach)
    for made in (
        EquilibriumLinear(6, 8, 3, dtype=torch.float64),
        EquilibriumConv2d(2, 2, 2, image=(4, 4)),
        PooledEquilibriumConv2d(2, 2, 2, image=(4, 4), gamma=None),
    )
)
LOGITS = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
STATES = torch.linspace(-1, 1, 32, dtype=torch.float64).view(4, 8)


def everything() -> list[float]:
    w, y, labels = DENSE, LOGITS, LOGITS.argmax(1)
    pairs = certify(w, tighten_pairs(w))
    local = LocalCertifier(w, ReLU(), 2.0)
    operating_points = OperatingPoints(
        v=STATES, v_error=0 * STATES, logits=y, logit_error=0 * y[:, 0]
    )
    radii = margin_radius(y, labels, 2.0, logit_error=0.01)
    found = [
        certify(w).margin,
        certify(w.to(torch.float32)).m,
        certify(w, tighten_scaled(w)).bound,
        certify(w, tighten_diagonal(w)).bound,
        certify(KERNELS, image=(4, 4)).margin,
        certify(POOLED, tighten_pooled(POOLED)).bound,
        *(b for row in pairs for b in row),
        *certify(w, tighten_pairs(w, fix_multiplier=True))[0],
        *certify(w, tighten_linf(w))[0],
        *certify(w, tighten_linf(w, fix_multiplier=False))[0],
        *certify(w, IntervalClaim())[0],
        *radii.tolist(),
        *margin_radius(y.float(), labels, pairs, logit_error=0.01).tolist(),
        *local.radius(operating_points, labels, radii, steps=2).tolist(),
        *map(float, local.certifies(operating_points, labels, 0.2, constraints=True).tolist()),
        *(int(text[:12], 16) for text in (w.fingerprint, KERNELS.fingerprint, local.fingerprint)),
    ]
    assert not any(map(math.isnan, found))
    return found


@contextlib.contextmanager
def switched(switch, value, back):
    switch(value)
    try:
        yield
    finally:
        switch(back)


SETTINGS = {
    "default float64": lambda: switched(torch.set_default_dtype, torch.float64, torch.float32),
    "default float16": lambda: switched(torch.set_default_dtype, torch.float16, torch.float32),
    "default device": lambda: torch.device("meta"),
    "bfloat16 products": lambda: switched(
        torch.set_float32_matmul_precision, "medium", torch.get_float32_matmul_precision()
    ),
    "deterministic": lambda: switched(torch.use_deterministic_algorithms, True, False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "two threads": lambda: switched(torch.set_num_threads, 2, torch.get_num_threads()),
    "denormal numbers are zero": lambda: switched(torch.set_flush_denormal, True, False),
}


@pytest.fixture(scope="module")
def expected():
    return everything()


@pytest.mark.parametrize("name", SETTINGS)
def test_proofs_do_not_depend_on_settings(name, expected):
    with SETTINGS[name]():
        found = everything()
    # Another number of threads sums proposals in another order.
    assert found == pytest.approx(expected, rel=1e-6 if "threads" in name else 1e-13)
