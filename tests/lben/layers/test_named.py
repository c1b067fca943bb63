"""Every family of feed-forward layers: proved, attacked, approached, differentiated."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from lben import (
    AOLConv2d,
    CertificateError,
    ConvolutionalWeights,
    DenseWeights,
    OrthogonalConv2d,
    OrthogonalLinear,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    certify,
)
from lben.parameterizations.feedforward import UNIT_BOUND
from tests.lben.layers.families import (
    CONVOLUTIONAL,
    DENSE,
    IMAGE,
    check_gradients,
    perturb,
    sample,
)


def ascend(layer, steps=200):
    """Return the largest Lipschitz quotient that gradient ascent finds, in float64."""
    x = sample(layer, 16)
    delta = torch.randn_like(x)
    best = 0.0
    optimizer = torch.optim.Adam([x.requires_grad_(), delta.requires_grad_()], lr=0.03)
    for _ in range(steps):
        change = (layer(x + delta) - layer(x)).flatten(1).norm(dim=1)
        quotient = change / delta.flatten(1).norm(dim=1)
        best = max(best, float(quotient.detach().max()))
        optimizer.zero_grad()
        (-quotient.log().sum()).backward(inputs=[x, delta])
        optimizer.step()
    return best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", DENSE)
def test_dense_layers_are_proved(kind, dtype):
    certificate = perturb(DENSE[kind](dtype=dtype)).certificate()
    assert certificate.bound == UNIT_BOUND
    assert certificate.margin > 0


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_convolutions_are_proved_at_every_frequency(kind, dtype, circular):
    certificate = perturb(CONVOLUTIONAL[kind](dtype=dtype, circular=circular)).certificate(IMAGE)
    assert certificate.bound == UNIT_BOUND
    assert certificate.margin > 0
    assert "frequencies" in certificate.method


@pytest.mark.parametrize("kind", DENSE)
def test_dense_quotients_come_near_one_and_never_above(kind):
    assert 0.9 < ascend(perturb(DENSE[kind](dtype=torch.float64))) <= UNIT_BOUND


@pytest.mark.parametrize("kind", ["SLL", "SLL even", "CPL", "sandwich", "spectral"])
@pytest.mark.parametrize("circular", [False, True])
def test_convolutional_quotients_never_exceed_one(kind, circular):
    layer = perturb(CONVOLUTIONAL[kind](dtype=torch.float64, circular=circular))
    found = ascend(layer)
    assert found <= UNIT_BOUND
    assert found > (0.9 if "SLL" in kind or kind == "CPL" else 0.3)


@pytest.mark.parametrize("kind", ["SLL", "CPL", "AOL with q", "spectral", "Cayley", "sandwich"])
def test_trained_layers_are_proved_and_reach_their_bound(kind):
    layer = perturb(DENSE[kind](dtype=torch.float64))
    outputs = layer(sample(layer)).shape[1]
    target = torch.nn.init.orthogonal_(torch.empty(outputs, layer.inputs, dtype=torch.float64))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    for _ in range(150):
        x = sample(layer, 64)
        loss = (layer(x) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert layer.certificate().bound == UNIT_BOUND
    assert 0.9 < ascend(layer) <= UNIT_BOUND


@pytest.mark.parametrize("kind", ["SLL", "AOL", "sandwich"])
def test_float32_quotients_stay_within_a_millionth(kind):
    layer = perturb(DENSE[kind](dtype=torch.float32))
    a, b = sample(layer, 2000), 3 * sample(layer, 2000)
    quotient = (layer(a) - layer(b)).norm(dim=1) / (a - b).norm(dim=1)
    assert float(quotient.detach().max()) <= 1 + 1e-6


@pytest.mark.parametrize("fault", ["sign", "no absolute value", "half"])
def test_a_wrong_T_is_refused(fault):
    w = perturb(SLLLinear(12, 12, dtype=torch.float64)).weights()
    gram = w.U @ w.U.T
    T = {
        "sign": (2 * gram.diagonal() - gram.abs().sum(1)).abs(),
        "no absolute value": gram.sum(1).abs(),
        "half": 0.4 * torch.linalg.matrix_norm(gram, 2) * torch.ones(12, dtype=torch.float64),
    }[fault]
    wrong = DenseWeights(
        W=w.W, U=w.U, b=w.b, C=-2 * w.U.T / T, D=w.D, b_y=w.b_y, Lambda=2 / T, gamma=w.gamma
    )
    with pytest.raises(CertificateError, match="could not be proved"):
        certify(wrong)


def test_a_T_of_too_few_taps_is_refused():
    """The padding of the kernel's correlation with itself must be k − 1, not ⌊k/2⌋."""
    w = SLLConv2d(2, 2, dtype=torch.float64).weights()
    U = torch.ones_like(w.U)
    T = functional.conv2d(U, U, padding=1).abs().sum((1, 2, 3))
    C = -U.transpose(0, 1).flip(2, 3) * (2 / T)[:, None, None]
    wrong = ConvolutionalWeights(
        U=U, b=w.b, C=C, D=1.0, b_y=w.b_y, Lambda=2 / T, gamma=w.gamma, circular=False
    )
    with pytest.raises(CertificateError, match="could not be proved"):
        certify(wrong, image=(16, 16))


@pytest.mark.parametrize("kind", DENSE)
def test_dense_gradients(kind):
    layer = perturb(DENSE[kind](dtype=torch.float64))
    check_gradients(layer)


@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_convolutional_gradients(kind):
    check_gradients(perturb(CONVOLUTIONAL[kind](dtype=torch.float64, circular=True)))


def test_stride_only_leaves_pixels_out():
    layer, strided = AOLConv2d(3, 2), AOLConv2d(3, 2, stride=2)
    strided.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(strided(x), layer(x)[:, :, ::2, ::2])
    assert strided.certificate((8, 8)).margin > 0


def test_large_products_use_another_library_and_lie_above_the_exact_sums():
    U = torch.randn(700, 400)
    assert 88 * 400 * 700 >= 2**24
    T = SLLLinear(400, 700).parameterization.rule(U)
    exact = (U.double() @ U.double().T).abs().sum(1)
    assert (T.double() >= exact).all()
    assert (T.double() <= exact * 1.001).all()


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e18])
@pytest.mark.parametrize("kind", ["SLL", "CPL", "AOL", "sandwich"])
def test_extreme_weights_run_and_are_proved(kind, scale):
    layer = DENSE[kind]()
    with torch.no_grad():
        weight = next(layer.parameters())
        weight.mul_(scale)
    assert torch.isfinite(layer(sample(layer, 3))).all()
    assert layer.certificate().bound == UNIT_BOUND


@pytest.mark.parametrize("shift", [-300.0, -90.0, 90.0, 300.0])
def test_only_ratios_of_q_matter(shift):
    layer = perturb(SLLLinear(6, 4))
    before = layer(sample(layer, 2) * 0 + 1)
    with torch.no_grad():
        layer.parameterization.rule.log_q.add_(shift)
    torch.testing.assert_close(layer(sample(layer, 2) * 0 + 1), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layer.parameterization.rule.log_q[0] -= 1000
    assert layer.certificate().bound == UNIT_BOUND


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SLLLinear(3, 2)(torch.zeros(4, 5)), "expected 3 features"),
        (lambda: SLLLinear(3, 2)(torch.zeros(())), "expected 3 features"),
        (lambda: SLLLinear(3, 2)(torch.zeros(4, 3).double()), "x is torch.float64, the layer is"),
        (lambda: SLLLinear(3, 2)(torch.zeros(4, 3).half()), "use torch.autocast"),
        (lambda: SLLLinear(3, 2).half()(torch.zeros(4, 3).half()), "parameters must be float32"),
        (lambda: SLLConv2d(3, 2)(torch.zeros(1, 4, 8, 8)), "images of 3 channels"),
        (lambda: SLLConv2d(3, 2, 5)(torch.zeros(1, 3, 4, 9)), "smaller than the kernel"),
        (lambda: SLLConv2d(3, 2, padding=3), "padding must lie in"),
        (lambda: SLLConv2d(3, 2, padding=0, circular=True), "circular padding of a 3 × 3"),
        (lambda: AOLConv2d(3, 2, stride=2, circular=True), "stride with circular padding"),
        (lambda: AOLConv2d(3, 2, stride=0), "kernel_size and stride must be at least 1"),
        (lambda: SLLConv2d(3, 2).certificate(), "proved for a size"),
        (lambda: SLLConv2d(3, 2, 5, circular=True).certificate((4, 4)), "smaller than the kernel"),
        (lambda: SLLConv2d(3, 2)(torch.zeros(8, 8)), "images of 3 channels"),
        (lambda: SLLConv2d(3, 2).certificate((0, 5)), "at least 1"),
        (lambda: OrthogonalConv2d(2, 2, image=(5, 5)).certificate((7, 7)), "made for images"),
        (lambda: SLLConv2d(9, 9).weights().dense((64, 64)), "too large matrices"),
        (lambda: SandwichLinear(3, 0), "at least 1"),
        (lambda: SandwichLinear(3, 2, hidden_features=6), "at most 5 hidden"),
        (lambda: SLLLinear(0, 3), "at least 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_activations_must_have_slopes_in_the_unit_interval():
    with pytest.raises(TypeError, match=r"must be a solvers\.ProximalActivation, got GELU"):
        SLLLinear(3, 2, activation=nn.GELU())


def test_layers_are_modules_that_repeat_themselves():
    layer = nn.Sequential(SLLLinear(3, 2), SLLConv2d(3, 2))
    assert "Gershgorin" in repr(layer)
    assert "Convolution(kernel_size=3" in repr(layer)


def test_a_sandwich_without_an_orthogonal_matrix_is_refused_by_name():
    layer = SandwichLinear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        original = layer.parameterization.parametrizations["AB"].original
        original.zero_()
        original[:, 2:] = 1e100  # I + S is singular in floating point
    with pytest.raises(ValueError, match="T leaves the range"):
        layer(torch.zeros(1, 3, dtype=torch.float64))


@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
    lambda p: torch.optim.Adam(p, lr=0.5, weight_decay=0.5),  # beyond 0
    lambda p: torch.optim.SGD(p, lr=0.5, weight_decay=1.0),
], ids=["AdamW", "Adam", "SGD"])  # fmt: skip
@pytest.mark.parametrize("sizes", [(6, 6), (6, 4), (4, 6)])
def test_reflections_stay_orthonormal_as_weights_decay(sizes, optimizer):
    layer, x = OrthogonalLinear(*sizes, orthogonal_map="householder"), torch.randn(8, sizes[0])
    start, steps = layer.weights().D, optimizer(layer.parameters())
    for _ in range(20):
        steps.zero_grad()
        layer(x).sin().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
        steps.step()
    D = layer.weights().D.detach()
    gram = D @ D.T if sizes[0] >= sizes[1] else D.T @ D
    torch.testing.assert_close(gram, torch.eye(min(sizes)).double(), rtol=0, atol=1e-5)
    assert not torch.allclose(D, start, atol=1e-2)
    other = OrthogonalLinear(*sizes, orthogonal_map="householder")
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x), rtol=0, atol=0)


def test_reflections_start_as_those_of_torch():
    torch.manual_seed(0)
    layer = OrthogonalLinear(6, 4, orthogonal_map="householder")
    torch_map = torch.nn.utils.parametrizations._Orthogonal(
        layer.parameterization.V, layer.parameterization.parametrizations.V[0].orthogonal_map
    )
    torch_map.base = layer.parameterization.parametrizations.V[0].base
    with torch.no_grad():
        expected = torch_map(layer.parameterization.parametrizations.V.original)
    assert torch.equal(layer.parameterization.V, expected)
