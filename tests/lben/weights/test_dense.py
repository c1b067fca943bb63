import pytest
import torch

from lben import DenseWeights


def weights(**changes):
    n, p, q = 3, 4, 2
    values = {
        "W": torch.zeros(n, n),
        "U": torch.zeros(n, p),
        "b": torch.zeros(n),
        "C": torch.zeros(q, n),
        "D": None,
        "b_y": torch.zeros(q),
        "Lambda": torch.ones(n),
        "gamma": 1.0,
    }
    return DenseWeights(**{**values, **changes})


def test_sizes():
    w = weights()
    assert (w.in_features, w.hidden_features, w.out_features) == (4, 3, 2)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [("W", (3, 4), r"\(3, 3\)"), ("D", (2, 3), r"\(2, 4\)"), ("Lambda", (4,), r"\(3,\)")],
)
def test_shapes_that_do_not_fit_are_refused(name, shape, expected):
    with pytest.raises(ValueError, match=f"{name} must have shape {expected}"):
        weights(**{name: torch.zeros(shape)})


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("inf"), float("nan")])
def test_gamma_must_be_positive(gamma):
    with pytest.raises(ValueError, match="gamma must be a positive, finite Lipschitz bound"):
        weights(gamma=gamma)


def test_fingerprint_sees_every_bit():
    seen = {weights().fingerprint}
    for name, value in weights().tensors().items():
        changed = value.clone()
        changed.view(-1)[0] += 1e-30
        if changed.equal(value):  # 1 + 1e-30 rounds back
            changed.view(-1)[0] = torch.nextafter(changed.view(-1)[0], torch.tensor(2.0))
        seen.add(weights(**{name: changed}).fingerprint)
    seen.add(weights(gamma=1.0000001).fingerprint)
    seen.add(weights().to(torch.float64).fingerprint)
    seen.add(weights(D=torch.zeros(2, 4)).fingerprint)
    assert len(seen) == 1 + 7 + 1 + 1 - 1 + 1
    assert weights().fingerprint in seen


def test_conversion_cuts_the_graph():
    w = weights(W=torch.zeros(3, 3, requires_grad=True))
    assert not w.to(torch.float64).W.requires_grad
    assert w.to(torch.float64).W.dtype == torch.float64
