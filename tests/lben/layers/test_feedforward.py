"""Explicit layers: proved, attacked, approached, evaluated as certified, and cached soundly."""

import copy
import math
import pickle
import resource
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lben import (
    AOLConv2d,
    AOLLinear,
    CertificateError,
    ConvolutionalWeights,
    CPLConv2d,
    CPLLinear,
    DenseWeights,
    NormalizedLinear,
    OrthogonalConv2d,
    OrthogonalLinear,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    SpectralConv2d,
    SpectralLinear,
    certify,
)
from lben.parameterizations.feedforward import UNIT_BOUND
from lben.weights.linear_maps import Convolution, Dense
from solvers import LeakyReLU, Sigmoid, Softplus, Tanh, backends

DENSE = {
    "SLL": lambda **o: SLLLinear(6, 4, **o),
    "SLL squared": lambda **o: SLLLinear(6, 9, squarings=2, **o),
    "CPL": lambda **o: CPLLinear(6, 4, **o),
    "AOL": lambda **o: AOLLinear(6, 4, **o),
    "AOL with q": lambda **o: AOLLinear(4, 6, learn_q=True, **o),
    "spectral": lambda **o: SpectralLinear(6, 4, **o),
    "Cayley": lambda **o: OrthogonalLinear(6, 4, **o),
    "Householder": lambda **o: OrthogonalLinear(4, 6, orthogonal_map="householder", **o),
    "sandwich": lambda **o: SandwichLinear(6, 4, **o),
    "wide sandwich": lambda **o: SandwichLinear(6, 4, hidden_features=9, **o),
}
CONVOLUTIONAL = {
    "SLL": lambda **o: SLLConv2d(3, 2, **o),
    "SLL 1 x 1": lambda **o: SLLConv2d(3, 2, 1, **o),
    "SLL even": lambda **o: SLLConv2d(3, 2, 2, **o),
    "SLL squared": lambda **o: SLLConv2d(2, 3, squarings=1, **o),
    "CPL": lambda **o: CPLConv2d(3, 2, **o),
    "AOL": lambda **o: AOLConv2d(3, 2, **o),
    "spectral": lambda **o: SpectralConv2d(2, 3, **o),
    "sandwich": lambda **o: SandwichConv2d(3, 2, **o),
}
IMAGE = (5, 6)


def draw_report(layer):
    """Move every parameter away from where it starts, as training does."""
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=0.7)
    return layer


def sample(layer, count=1):
    shape = (layer.inputs,) if isinstance(layer.map, Dense) else (layer.inputs, *IMAGE)
    return torch.randn(count, *shape, dtype=next(layer.parameters()).dtype)


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
    certificate = draw_report(DENSE[kind](dtype=dtype)).certificate()
    assert certificate.bound == UNIT_BOUND
    assert certificate.margin > 0


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_convolutions_are_proved_at_every_frequency(kind, dtype, circular):
    certificate = draw_report(CONVOLUTIONAL[kind](dtype=dtype, circular=circular)).certificate(
        IMAGE
    )
    assert certificate.bound == UNIT_BOUND
    assert certificate.margin > 0
    assert "frequencies" in certificate.method


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [(3, 3), (2, 5), (5, 2)])
def test_cayley_convolutions_are_proved_and_keep_norms(channels, dtype):
    layer = draw_report(OrthogonalConv2d(*channels, image=IMAGE, dtype=dtype))
    assert layer.certificate(IMAGE).bound == UNIT_BOUND
    x = sample(layer, 4)
    change = (layer(x) - layer(torch.zeros_like(x))).flatten(1).norm(dim=1)
    ratio = (change / x.flatten(1).norm(dim=1)).detach()
    assert float(ratio.max()) <= 1 + 1e-6
    if channels[0] <= channels[1]:
        assert float(ratio.min()) > 1 - 1e-5
    error = (copy.deepcopy(layer).double()(x.double()) - layer(x).double()).flatten(1).norm(dim=1)
    assert (error <= layer.rounding(x).double() + 1e-5).all()
    shifted = layer(x.roll((1, 2), (2, 3)))
    torch.testing.assert_close(shifted, layer(x).roll((1, 2), (2, 3)), rtol=1e-4, atol=1e-4)


def test_cayley_convolutions_are_those_of_one_image():
    layer = OrthogonalConv2d(2, 2, image=IMAGE)
    with pytest.raises(ValueError, match="made for images of 5 × 6"):
        layer(torch.zeros(1, 2, 6, 6))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        OrthogonalConv2d(2, 2, 7, image=IMAGE)
    check_gradients(draw_report(OrthogonalConv2d(2, 3, image=IMAGE, dtype=torch.float64)))


@pytest.mark.parametrize("kind", DENSE)
def test_dense_layers_compute_what_is_certified(kind):
    layer = draw_report(DENSE[kind](dtype=torch.float32))
    w, x = layer.weights(), sample(layer, 50)
    exact = x.double()
    expected = torch.relu(exact @ w.U.T + w.b) @ w.C.T + w.b_y
    if w.D is not None:
        expected = expected + exact @ w.D.T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_convolutions_compute_what_is_certified(kind, circular):
    """The layer on a large enough torus is the circular convolution of the certified kernels."""
    layer = draw_report(CONVOLUTIONAL[kind](dtype=torch.float64, circular=circular))
    w, x = layer.weights(), sample(layer, 3)
    assert isinstance(w, ConvolutionalWeights)
    height, width = w.grid(IMAGE)
    padded = functional.pad(x, (0, width - IMAGE[1], 0, height - IMAGE[0]))

    def convolve(kernel, image, anchor):
        k = kernel.shape[-1]
        wrapped = functional.pad(
            image, (anchor, k - 1 - anchor, anchor, k - 1 - anchor), "circular"
        )
        return functional.conv2d(wrapped, kernel)

    k = w.U.shape[-1]
    y = w.b_y[:, None, None].expand(3, -1, height, width).clone()
    if w.U.shape[0]:
        v = convolve(w.U, padded, k // 2) + w.b[:, None, None]
        z = torch.relu(v)
        if not circular:  # hidden pixels that zero padding does not have
            inside = torch.zeros(height, width, dtype=torch.bool)
            pad = layer.map.padding
            rows, columns = (s + 2 * pad - k + 1 for s in IMAGE)
            shift = k // 2 - pad
            assert shift == 0
            inside[:rows, :columns] = True
            z = z * inside
        y = y + convolve(w.C, z, k - 1 - k // 2)
    if isinstance(w.D, float):
        y = y + w.D * padded
    elif w.D is not None:
        y = y + convolve(w.D, padded, w.D.shape[-1] // 2)
    got = layer(x)
    torch.testing.assert_close(got, y[:, :, : got.shape[2], : got.shape[3]])


@pytest.mark.parametrize("kind", DENSE)
def test_dense_quotients_come_near_one_and_never_above(kind):
    assert 0.9 < ascend(draw_report(DENSE[kind](dtype=torch.float64))) <= UNIT_BOUND


@pytest.mark.parametrize("kind", ["SLL", "SLL even", "CPL", "sandwich", "spectral"])
@pytest.mark.parametrize("circular", [False, True])
def test_convolutional_quotients_never_exceed_one(kind, circular):
    layer = draw_report(CONVOLUTIONAL[kind](dtype=torch.float64, circular=circular))
    found = ascend(layer)
    assert found <= UNIT_BOUND
    assert found > (0.9 if "SLL" in kind or kind == "CPL" else 0.3)


@pytest.mark.parametrize("kind", ["SLL", "CPL", "AOL with q", "spectral", "Cayley", "sandwich"])
def test_trained_layers_are_proved_and_reach_their_bound(kind):
    layer = draw_report(DENSE[kind](dtype=torch.float64))
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
    layer = draw_report(DENSE[kind](dtype=torch.float32))
    a, b = sample(layer, 2000), 3 * sample(layer, 2000)
    quotient = (layer(a) - layer(b)).norm(dim=1) / (a - b).norm(dim=1)
    assert float(quotient.detach().max()) <= 1 + 1e-6


@pytest.mark.parametrize("fault", ["sign", "no absolute value", "half"])
def test_a_wrong_T_is_refused(fault):
    w = draw_report(SLLLinear(12, 12, dtype=torch.float64)).weights()
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
    layer = draw_report(DENSE[kind](dtype=torch.float64))
    check_gradients(layer)


@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_convolutional_gradients(kind):
    check_gradients(draw_report(CONVOLUTIONAL[kind](dtype=torch.float64, circular=True)))


def check_gradients(layer):
    if hasattr(layer, "activation"):
        layer.activation = Tanh()
    x = sample(layer, 2).requires_grad_()
    parameters = dict(layer.parameterization.named_parameters())
    for name, p in parameters.items():
        layer(x).square().sum().backward()
        direction = torch.randn_like(p)
        if "original" in name:
            direction.fill_diagonal_(0)
        found = float((p.grad * direction).sum())
        p.grad, h, value = None, 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(direction, alpha=sign * h)
                value.append(float(layer(x).square().sum()))
                p.add_(direction, alpha=-sign * h)
        assert found == pytest.approx((value[0] - value[1]) / (2 * h), rel=1e-4, abs=1e-6)
        for other in parameters.values():
            other.grad = None
    assert gradcheck(layer, (x[:1],))


@pytest.mark.parametrize("map", [
    Dense(), Convolution(kernel_size=3, padding=1), Convolution(kernel_size=3, padding=0),
    Convolution(kernel_size=3, padding=2, stride=1), Convolution(kernel_size=2, padding=1),
    Convolution(kernel_size=3, padding=1, circular=True),
    Convolution(kernel_size=4, padding=2, circular=True),
])  # fmt: skip
def test_adjoints(map):
    dense = isinstance(map, Dense)
    U = torch.randn(2, 3, *([] if dense else [map.kernel_size] * 2), dtype=torch.float64)
    x = torch.randn(1, 3, *([] if dense else [5, 6]), dtype=torch.float64)
    y = map.apply(x, U)
    h = torch.randn_like(y)
    torch.testing.assert_close((y * h).sum(), (x * map.adjoint(h, U)).sum())


def test_stride_only_leaves_pixels_out():
    layer, strided = AOLConv2d(3, 2), AOLConv2d(3, 2, stride=2)
    strided.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(strided(x), layer(x)[:, :, ::2, ::2])
    assert strided.certificate((8, 8)).margin > 0


@pytest.mark.parametrize("kind", ["SLL", "AOL", "Cayley", "sandwich"])
def test_what_is_kept_follows_the_parameters(kind):
    layer = draw_report(DENSE[kind](dtype=torch.float64)).eval()
    x = sample(layer, 3)
    with torch.no_grad():
        first, kept = layer(x), layer._tensors(torch.float64)
        assert all(map(torch.is_tensor, kept))
        assert layer._tensors(torch.float64)[0] is kept[0]
        parameter = next(layer.parameters())
        for change in (
            lambda: parameter.mul_(1.5),
            lambda: parameter.data.mul_(0.7),
            lambda: setattr(parameter, "data", parameter.data * 1.3),
        ):
            change()
            twin = copy.deepcopy(layer)
            assert torch.equal(layer(x), twin(x))
        assert not torch.equal(layer(x), first)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_T_is_computed_once_under_gradient_accumulation():
    layer, calls = SLLLinear(6, 4), []
    layer.parameterization.rule.register_forward_hook(lambda *_: calls.append(1))
    whole, x = torch.zeros(()), torch.randn(4, 5, 6)
    for part in x:
        layer(part).square().sum().backward()
    assert len(calls) == 1
    accumulated = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    whole = layer(x.flatten(0, 1)).square().sum()
    whole.backward()
    for p, expected in zip(layer.parameters(), accumulated, strict=True):
        torch.testing.assert_close(p.grad, expected)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    layer(x)
    assert len(calls) == 2


def test_one_entry_of_a_large_weight_is_seen():
    """One entry written through `.data` is seen, and the bound is that of what runs then."""
    layer = SLLLinear(300, 200).eval()
    x = torch.randn(500, 300)
    with torch.no_grad():
        before = layer(x)
        layer.parameterization.U.data[:, 1:].mul_(3.0)
        assert torch.equal(layer(x), copy.deepcopy(layer)(x))  # all of a matrix is seen
        before = layer(x)
        layer.parameterization.U.data[0, 0] += 5.0
        after = layer(x)
        assert not torch.equal(after, before)
        assert torch.equal(after, copy.deepcopy(layer)(x))
        y = layer(x.flip(0))
        quotient = (after - y).norm(dim=1) / (x - x.flip(0)).norm(dim=1).clamp_min(1e-6)
        assert float(quotient.max()) <= 1 + 1e-6


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_every_step_of_an_optimizer_is_seen(kind, options):
    layer = CPLLinear(40, 30)
    layer.parameterization.b.requires_grad_(False)
    optimizer = kind([p for p in layer.parameters() if p.requires_grad], lr=0.5, **options)
    x = torch.randn(6, 40)
    for _ in range(3):
        y = layer(x)
        torch.testing.assert_close(y, copy.deepcopy(layer)(x))
        optimizer.zero_grad()
        y.square().sum().backward()
        optimizer.step()


def test_buffers_are_watched():
    layer = OrthogonalLinear(5, 5).eval()
    x = torch.randn(3, 5)
    with torch.no_grad():
        first = layer(x)
        for name, buffer in layer.named_buffers():
            if name.endswith("base"):
                buffer.neg_()
        w = layer.weights()
        torch.testing.assert_close(layer(x), (x.double() @ w.D.T + w.b_y).float())
        assert not torch.allclose(layer(x), first)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_may_be_checkpointed(reentrant):
    layer = SLLLinear(6, 4)
    x = torch.randn(3, 6, requires_grad=True)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    found = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    for p, expected in zip(layer.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize("make", [
    lambda: SLLLinear(200, 400), lambda: CPLLinear(200, 400), lambda: AOLConv2d(48, 48),
    lambda: SandwichLinear(200, 200),
])  # fmt: skip
def test_the_graph_of_old_values_is_freed(make):
    layer = make()
    x = sample(layer, 2)

    def resident(steps):
        for _ in range(steps):
            layer(x).square().sum().backward()
            with torch.no_grad():
                for p in layer.parameters():
                    p.mul_(0.999)
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident(20)
    assert resident(60) < before + 25e6


def test_transforms_of_torch_func():
    layer = SLLLinear(5, 4, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    J = torch.func.jacrev(layer)(x[0])
    assert float(torch.linalg.matrix_norm(J.detach(), 2)) <= UNIT_BOUND
    parameters = dict(layer.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)


@pytest.mark.parametrize("activation", [Sigmoid(), Softplus()])
def test_rounding_where_the_activation_of_zero_is_not_zero(activation):
    layer = SLLLinear(6, 50, activation=activation)
    with torch.no_grad():
        layer.parameterization.b.zero_()
        x = torch.zeros(1, 6)
        tensors = layer.parameterization.to_exact(torch.float32)
        exact = layer.evaluate(x.double(), torch.float64, tensors)
        error = (layer(x).double() - exact).norm()
    assert 0 < float(error) <= float(layer.rounding(x))


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
    layer = draw_report(SLLLinear(6, 4))
    before = layer(sample(layer, 2) * 0 + 1)
    with torch.no_grad():
        layer.parameterization.rule.log_q.add_(shift)
    torch.testing.assert_close(layer(sample(layer, 2) * 0 + 1), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layer.parameterization.rule.log_q[0] -= 1000
    assert layer.certificate().bound == UNIT_BOUND


def test_certificates_are_for_their_weights_and_images():
    layer, other = draw_report(SLLConv2d(3, 2)), draw_report(SLLConv2d(3, 2))
    proof = layer.certificate((8, 8))
    layer.check(proof, torch.zeros(1, 3, 8, 8))
    layer.check(proof, torch.zeros(1, 3, 5, 8))
    with pytest.raises(CertificateError, match="for images of"):
        layer.check(proof, torch.zeros(1, 3, 9, 8))
    with pytest.raises(CertificateError, match="for other weights"):
        other.check(proof, torch.zeros(1, 3, 8, 8))
    circular = draw_report(SLLConv2d(3, 2, circular=True))
    with pytest.raises(CertificateError, match="for images of"):
        circular.check(circular.certificate((8, 8)), torch.zeros(1, 3, 7, 8))
    with torch.no_grad():
        layer.parameterization.U.mul_(2)
    with pytest.raises(CertificateError, match="for other weights"):
        layer.check(proof, torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("kind", CONVOLUTIONAL)
@pytest.mark.parametrize("circular", [False, True])
def test_matrices_of_a_convolution(kind, circular):
    layer = draw_report(CONVOLUTIONAL[kind](dtype=torch.float64, circular=circular))
    w, x = layer.weights().dense(IMAGE), sample(layer, 3)
    flat = x.flatten(1)
    y = torch.relu(flat @ w.U.T + w.b) @ w.C.T + w.b_y
    y = y if w.D is None else y + flat @ w.D.T
    torch.testing.assert_close(y, layer(x).flatten(1))
    assert certify(w).bound == UNIT_BOUND


def test_a_layer_may_be_used_twice_in_one_graph():
    layer = SLLLinear(6, 4, dtype=torch.float64)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: layer(layer(x)), (x,))
    (first,) = torch.autograd.grad(layer(layer(x)).square().sum(), x, create_graph=True)
    first.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_autocast_runs_and_certifies_the_rounded_weights():
    layer = draw_report(SLLLinear(8, 12))
    x = torch.randn(40, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, layer(x), rtol=0, atol=0.1)
    assert not torch.equal(y, layer(x))
    certificate = layer.certificate(compute_dtype=torch.bfloat16)
    assert certificate.bound == UNIT_BOUND
    assert certificate.fingerprint != layer.certificate().fingerprint
    # A T of the weights before rounding does not hold for those after it.
    U, b, scale = layer.parameterization.to_exact(torch.float32)
    U = U.bfloat16().double()
    w = layer.weights()
    bad = DenseWeights(
        W=w.W, U=U, b=b, C=-U.T * scale * 1.01, D=w.D, b_y=w.b_y, Lambda=scale, gamma=w.gamma
    )
    with pytest.raises(CertificateError):
        certify(bad)


@pytest.mark.parametrize("make", [lambda: SLLLinear(8, 6), lambda: SLLConv2d(3, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_breaks(make, training):
    layer = make().train(training)
    x = sample(layer, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        y = compiled(x)
    near = {"rtol": 1e-4, "atol": 1e-4}  # T is rounded upwards in float64 there
    torch.testing.assert_close(y, layer(x), **near)
    y.sum().backward()
    got = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).sum().backward()
    for p, g in zip(layer.parameters(), got, strict=True):
        torch.testing.assert_close(p.grad, g, **near)


def test_channels_last_is_kept():
    layer = SLLConv2d(4, 3)
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    y = layer.to(memory_format=torch.channels_last)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x.contiguous()))


@pytest.mark.parametrize("kind", [*DENSE, *CONVOLUTIONAL])
def test_rounding_is_bounded(kind):
    layer = draw_report((DENSE | CONVOLUTIONAL)[kind]())
    x = sample(layer, 20)
    exact = copy.deepcopy(layer).double()
    weights = layer.parameterization.to_exact(torch.float32)
    y = exact.evaluate(x.double(), torch.float64, weights)
    error = (layer(x).double() - y).flatten(1).norm(dim=1)
    bound = layer.rounding(x).double()
    assert (error <= bound).all()
    assert (bound <= 1e-2 * (1 + x.flatten(1).norm(dim=1))).all()


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


def test_autocast_to_float16_is_refused():
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match="overflows in T"),
    ):
        SLLLinear(3, 2)(torch.zeros(4, 3))


def test_layers_are_modules_that_repeat_themselves():
    layer = nn.Sequential(SLLLinear(3, 2), SLLConv2d(3, 2))
    assert "Gershgorin" in repr(layer)
    assert "Convolution(kernel_size=3" in repr(layer)


LAYERS = {
    "residual": lambda: SLLLinear(7, 5),
    "residual images": lambda: SLLConv2d(3, 4, 3, padding=1),
    "leaky": lambda: SLLConv2d(3, 4, 3, padding=1, activation=LeakyReLU(0.1)),
    "contraction": lambda: AOLLinear(7, 5),
    "contraction images": lambda: AOLConv2d(3, 4, 3, padding=1),
    "sandwich": lambda: SandwichLinear(7, 6),
    "sandwich images": lambda: SandwichConv2d(3, 4, 3, padding=1),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_one_pass_in_place_of_three_changes_nothing(kind, channels_last, monkeypatch):
    """As on a CUDA device; without one the kernels are interpreted."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = LAYERS[kind]().double().to(device)
    images = isinstance(layer.map, Convolution)
    x = torch.randn((2, 3, 6, 5) if images else (2, 3, 7)).double().to(device)
    if channels_last:
        if not images:
            pytest.skip("of images")
        x = x.to(memory_format=torch.channels_last)
    original, calls = backends.activated, []

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(backends, "activate", counted)
    x.requires_grad_()

    def results():
        layer.train()
        y = layer(x)
        inputs = (x, *layer.parameters())
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), inputs, allow_unused=True)
        plain = torch.autograd.grad(layer(x).sin().sum(), inputs)
        with torch.no_grad():
            return y, first, second, plain, layer.eval()(x)

    monkeypatch.setattr(backends.pointwise, "serves", lambda tensor: False)
    expected, before = results(), x.detach().clone()
    assert not calls
    monkeypatch.setattr(backends.pointwise, "serves", lambda tensor: True)
    for found, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert len(calls) == (2 if "contraction" in kind else 3)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SLLLinear(8, 6),
        lambda: SLLConv2d(3, 2),
        lambda: AOLLinear(8, 6),
        lambda: OrthogonalLinear(8, 6, orthogonal_map="matrix_exp"),
        lambda: SandwichLinear(96, 96),
        lambda: NormalizedLinear(64, 64, kind="orthonormal"),
    ],
)
def test_what_is_proved_is_what_runs_also_where_products_are_rounded(make):
    layer = make()
    expected = layer.weights().fingerprint
    pairs = layer.pair_certificate() if isinstance(layer, NormalizedLinear) else torch.zeros(())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert layer.weights().fingerprint == expected
        if isinstance(layer, NormalizedLinear):
            assert torch.equal(layer.pair_certificate(), pairs)
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(ValueError, match="autocast is enabled"),
        ):
            layer.weights()
    finally:
        torch.set_float32_matmul_precision(before)


def test_rounding_covers_weights_that_are_read_as_zero():
    # T of small weights is small: what V x misses is multiplied by T^(−½).
    layer = AOLLinear(2, 1)
    with torch.no_grad():
        layer.parameterization.V.copy_(torch.tensor([[2.0**-130, 2.0**-130]]))
        layer.parameterization.b_y.zero_()
    x = torch.tensor([[2.0**60, 2.0**60]])
    exact = layer.weights().D @ x[0].double()
    torch.set_flush_denormal(True)
    try:
        y, bound = layer(x).detach(), layer.rounding(x)
    finally:
        torch.set_flush_denormal(False)
    assert float((y[0].double() - exact).abs()) <= float(bound) < math.inf


def test_a_sandwich_without_an_orthogonal_matrix_is_refused_by_name():
    layer = SandwichLinear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        original = layer.parameterization.parametrizations["AB"].original
        original.zero_()
        original[:, 2:] = 1e100  # I + S is singular in floating point
    with pytest.raises(ValueError, match="T leaves the range"):
        layer(torch.zeros(1, 3, dtype=torch.float64))


class _Coarse(Tanh):
    """tanh by an approximation of which it says how far off it is."""

    @property
    def ulps(self):
        return 1e6

    def __call__(self, v):
        return torch.tanh(v) * (1 + 9e5 * torch.finfo(v.dtype).eps)


def test_rounding_knows_the_ulps_of_the_activation():
    coarse = SLLLinear(3, 4, activation=_Coarse(), dtype=torch.float64)
    fine = SLLLinear(3, 4, activation=Tanh(), dtype=torch.float64)
    fine.load_state_dict(coarse.state_dict())
    x = torch.randn(5, 3, dtype=torch.float64)
    with torch.no_grad():
        missed = (coarse(x) - fine(x)).norm(dim=1)
    assert bool((missed <= coarse.rounding(x)).all())
    assert bool((missed > fine.rounding(x)).all())


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
