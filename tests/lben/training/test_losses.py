import math

import pytest
import torch
from torch.nn import functional

from lben.training.losses import EMMA, CrossEntropy, Hinge, emma

LABELS = torch.tensor([0, 2, 1, 1, 0])


def draw():
    return torch.randn(5, 3, dtype=torch.float64)


def test_the_default_is_plain_cross_entropy_bit_for_bit():
    y = draw().float()
    assert torch.equal(CrossEntropy()(y, LABELS), functional.cross_entropy(y, LABELS))
    scaled = functional.cross_entropy(y * 3.0, LABELS)
    assert torch.equal(CrossEntropy(scale=3.0)(y, LABELS), scaled)


@pytest.mark.parametrize("margin", [-3.0, 0.5, 2.0, 9.0])
def test_cross_entropy_of_two_classes_is_a_softplus_of_the_margin(margin):
    loss = CrossEntropy(temperature=0.25, offset=1.5 * math.sqrt(2))
    y = torch.tensor([[margin, 0.0]], dtype=torch.float64)
    expected = 0.25 * math.log1p(math.exp((1.5 * math.sqrt(2) - margin) / 0.25))
    assert float(loss(y, torch.tensor([0]))) == pytest.approx(expected, rel=1e-12)


def test_a_scale_is_an_inverse_temperature():
    y = draw()
    scaled, cooled = CrossEntropy(scale=4.0), CrossEntropy(temperature=0.25)
    torch.testing.assert_close(scaled(y, LABELS), 4 * cooled(y, LABELS))


def test_hinge_is_its_formula_and_ends_at_the_margin():
    y = draw()
    expected = sum(
        max(0.0, 0.7 - float(row[i] - row[j])) / 3
        for row, i in zip(y, LABELS.tolist(), strict=True)
        for j in range(3)
        if j != i
    )
    assert float(Hinge(margin=0.7)(y, LABELS)) == pytest.approx(expected / 5)
    far = torch.tensor([[1.0, 0.2, 0.31]], dtype=torch.float64, requires_grad=True)
    Hinge(margin=0.7)(far, torch.tensor([0])).backward()
    assert far.grad[0].tolist() == pytest.approx([-1 / 3, 0.0, 1 / 3])


@pytest.mark.parametrize("offset", [0.5, 2.0])
def test_an_offset_moves_the_optimum(offset):
    """Under the penalty a²/(4·offset) the best margin a is the offset: σ(0) = ½ = a/(2·offset)."""

    def best(loss):
        a = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for _ in range(200):
            y = torch.stack([a, torch.zeros_like(a)])[None]
            (slope,) = torch.autograd.grad(loss(y, torch.tensor([0])) + a**2 / (4 * offset), a)
            a = (a - 0.5 * slope).detach().requires_grad_()
        return float(a.detach())

    assert best(CrossEntropy(temperature=0.3, offset=offset)) == pytest.approx(offset, abs=1e-6)
    assert best(CrossEntropy(temperature=0.3)) < 0.9 * offset


# The own class leads class 1 by 2, class 2 by 0.4, and trails class 3 by 0.5.
Y = torch.tensor([[3.0, 1.0, 2.6, 3.5]], dtype=torch.float64)
ATTACKED = torch.tensor([[3.0, 2.0, 3.0, 3.5]], dtype=torch.float64)  # K = 2, radius 0.5


def test_emma_gives_each_class_what_its_adversary_could():
    loss = EMMA(radius=0.5, bound=math.sqrt(2))
    y = Y.clone().requires_grad_()
    value = loss(y, torch.tensor([0]))
    torch.testing.assert_close(value, functional.cross_entropy(ATTACKED, torch.tensor([0])))
    value.backward()  # the adversary is held constant
    own = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(y.grad, ATTACKED.softmax(1) - own)


def test_emma_takes_a_constant_per_pair():
    pairs = torch.full((4, 4), 2.0, dtype=torch.float64)
    torch.testing.assert_close(
        emma(Y, torch.tensor([0]), 0.5, pairs), EMMA(radius=0.5, bound=math.sqrt(2))(Y, LABELS[:1])
    )
    pairs[0, 1] = 0.6  # of the pair (label, wrong class); its adversary gives 0.5 · 0.6
    pairs.fill_diagonal_(math.nan)
    pairs.requires_grad_()
    expected = ATTACKED.clone()
    expected[0, 1] = 1.3
    value = emma(Y, torch.tensor([0]), 0.5, pairs)
    torch.testing.assert_close(value, functional.cross_entropy(expected, torch.tensor([0])))
    value.backward()
    assert pairs.grad[0, 1] == pytest.approx(float(0.5 * expected.softmax(1)[0, 1]))
    assert (pairs.grad[1:] == 0).all()


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(temperature=0.25, offset=2.1, scale=1.3), Hinge(margin=0.9),
        EMMA(radius=1e-3, bound=2.0),
    ],
    ids=repr,
)  # fmt: skip
def test_gradients(loss):
    """The radius of EMMA is small enough that no class is on its way to a tie."""
    y = draw().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: loss(y, LABELS), y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossEntropy(temperature=0.0), "temperature must be positive"),
        (lambda: CrossEntropy(scale=math.inf), "scale must be positive and finite, got inf"),
        (lambda: CrossEntropy(offset=-1.0), "offset must be at least 0"),
        (lambda: Hinge(margin=-1.0), "margin must be positive"),
        (lambda: EMMA(radius=0.0, bound=1.0), "radius must be positive"),
        (lambda: EMMA(radius=1.0, bound=math.nan), "bound must be positive"),
        (lambda: Hinge(margin=1.0)(torch.zeros(3), LABELS), "expected logits"),
        (lambda: CrossEntropy()(torch.zeros(4, 3), LABELS), r"got \(4, 3\) and \(5,\)"),
        (lambda: EMMA(radius=1.0, bound=1.0)(torch.zeros(5, 1), LABELS), "classes ≥ 2"),
        (lambda: emma(draw(), LABELS, 1.0, torch.ones(3, 2)), "one number or 3 × 3, got shape"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("loss", [CrossEntropy(), Hinge(margin=1.0), EMMA(radius=0.5, bound=2.0)])
def test_labels_are_integers_of_any_type(loss):
    logits, labels = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.bool):
        assert torch.equal(loss(logits, labels.to(dtype)), loss(logits, labels))
    with pytest.raises(ValueError, match=r"labels must be integers, got torch\.float32"):
        loss(logits, labels.float())
