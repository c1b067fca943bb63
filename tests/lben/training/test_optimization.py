import math

import pytest
import torch
from torch import nn

from lben.training.optimization import (
    EMA,
    SGD,
    Adam,
    AdamW,
    Constant,
    PiecewiseLinear,
    WarmupCosine,
)


class Point(nn.Module):
    """A matrix, a vector, a float buffer and a count."""

    def __init__(self, value=1.0):
        super().__init__()
        self.matrix = nn.Parameter(torch.full((1, 1), value))
        self.vector = nn.Parameter(torch.full((1,), value))
        self.register_buffer("mean", torch.full((2,), value))
        self.register_buffer("count", torch.tensor(int(value)))


def moved(config, slopes, lr=0.1):
    """Return matrix and vector after steps with these gradients."""
    point = Point()
    optimizer = config.build(point)
    for slope in slopes:
        for group in optimizer.param_groups:
            group["lr"] = lr
        for parameter in point.parameters():
            parameter.grad = torch.full_like(parameter, slope)
        optimizer.step()
    return float(point.matrix.detach()), float(point.vector.detach())


def test_sgd_is_its_recursion():
    assert moved(SGD(momentum=0.0, nesterov=False), [2.0, 1.0])[0] == pytest.approx(1 - 0.1 * 3)
    plain = 1 - 0.1 * (2 + (0.9 * 2 + 1))
    assert moved(SGD(nesterov=False), [2.0, 1.0])[0] == pytest.approx(plain)
    ahead = 1 - 0.1 * ((2 + 0.9 * 2) + (1 + 0.9 * (0.9 * 2 + 1)))
    assert moved(SGD(), [2.0, 1.0])[0] == pytest.approx(ahead)


@pytest.mark.parametrize("make", [Adam, AdamW])
def test_adam_is_its_recursion(make):
    a, b = 0.5, 0.9
    first = (a * (1 - a) * 2 + (1 - a) * 1) / (1 - a**2)
    second = (b * (1 - b) * 4 + (1 - b) * 1) / (1 - b**2)
    expected = 1 - 0.1 - 0.1 * first / math.sqrt(second)
    assert moved(make(betas=(a, b)), [2.0, 1.0])[0] == pytest.approx(expected, rel=1e-6)
    assert moved(make(), [2.0, 1.0])[0] != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("make", [SGD, Adam, AdamW])
def test_weight_decay_shrinks_matrices_and_leaves_vectors(make):
    matrix, vector = moved(make(weight_decay=0.5), [0.0])
    assert vector == 1.0
    assert matrix < 0.96
    if make is AdamW:
        assert matrix == pytest.approx(1 - 0.1 * 0.5)  # decoupled


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(momentum=1.0), r"momentum must lie in \[0, 1\)"),
        (lambda: SGD(momentum=0.0), "it needs momentum above 0"),
        (lambda: SGD(weight_decay=-1.0), "weight_decay must be at least 0"),
        (lambda: AdamW(weight_decay=math.nan), "weight_decay must be at least 0"),
        (lambda: Adam(betas=(0.5, 1.0)), r"betas must lie in \[0, 1\)"),
        (lambda: WarmupCosine(warmup=1.5), r"warmup must lie in \[0, 1\]"),
        (lambda: EMA(Point(), 1.0), r"must lie in \(0, 1\), got 1.0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_warmup_then_cosine_to_zero():
    rates = [WarmupCosine()(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[15] == max(rates) == 1.0
    assert rates[100] == pytest.approx(0.0)
    assert rates[15:] == sorted(rates[15:], reverse=True)
    assert WarmupCosine(warmup=0.5)(50, 100) == 1.0


def test_the_piecewise_linear_schedule_meets_its_corners():
    corners = {0: 0.0, 20: 0.5, 40: 1.0, 60: 0.525, 80: 0.05, 90: 0.025, 100: 0.0}
    rates = {step: PiecewiseLinear()(step, 100) for step in corners}
    assert rates == pytest.approx(corners)
    assert [Constant()(step, 7) for step in range(8)] == [1.0] * 8


def test_the_average_is_its_recursion_and_forgets_the_start():
    ema, target, expected = EMA(Point(0.0), 0.5), Point(), 0.0
    for step in range(1, 30):
        ema.update(Point(float(step)))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        ema.copy_to(target)
        for tensor in (target.matrix, target.vector, target.mean[:1]):
            assert float(tensor.detach()) == pytest.approx(expected, rel=1e-5)
    assert int(target.count) == 29  # taken over, not averaged
    slow = EMA(Point(0.0), 0.9999)
    for _ in range(1000):
        slow.update(Point(1.0))
    slow.copy_to(target)
    assert float(target.mean[0]) > 0.99


def test_a_swap_is_undone_even_after_an_error():
    model, ema = Point(2.0), EMA(Point(1.0), 0.5)

    def fail():
        with ema.swap(model):
            assert float(model.matrix.detach()) == float(model.mean[0]) == 1.0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert float(model.matrix.detach()) == float(model.mean[0]) == 2.0
    model.matrix.data.fill_(5.0)  # the average shares no memory
    with ema.swap(model):
        assert float(model.matrix.detach()) == 1.0


def test_an_average_continues_from_its_state():
    ema, other = EMA(Point(1.0), 0.9), EMA(Point(7.0), 0.9)
    ema.update(Point(3.0))
    other.load_state_dict({k: v.clone() for k, v in ema.state_dict().items()})
    ema.update(Point(4.0))
    other.update(Point(4.0))
    a, b = ema.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert int(a["steps"]) == 2
