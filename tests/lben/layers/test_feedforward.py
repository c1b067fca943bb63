"""A feed-forward layer runs what it certifies, rounds within its bound, and keeps nothing stale."""

import copy
import math
import pickle
import resource
import warnings
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lben import (
    AOLConv2d,
    AOLLinear,
    CertificateError,
    ConvolutionalWeights,
    CPLLinear,
    DenseWeights,
    NormalizedLinear,
    OrthogonalLinear,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    certify,
)
from lben.parameterizations.feedforward import UNIT_BOUND
from lben.weights.linear_maps import Convolution
from solvers import LeakyReLU, Sigmoid, Softplus, Tanh, backends
from tests.lben.layers.families import CONVOLUTIONAL, DENSE, IMAGE, perturb, sample


@pytest.mark.parametrize("kind", DENSE)
def test_dense_layers_compute_what_is_certified(kind):
    layer = perturb(DENSE[kind](dtype=torch.float32))
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
    layer = perturb(CONVOLUTIONAL[kind](dtype=torch.float64, circular=circular))
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


@pytest.mark.parametrize("kind", ["SLL", "AOL", "Cayley", "sandwich"])
def test_what_is_kept_follows_the_parameters(kind):
    layer = perturb(DENSE[kind](dtype=torch.float64)).eval()
    x = sample(layer, 3)
    with torch.no_grad():
        first, stored = layer(x), layer._tensors(torch.float64)
        assert all(map(torch.is_tensor, stored))
        assert layer._tensors(torch.float64)[0] is stored[0]
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
        tensors = layer.parameterization.compute_in_float64(torch.float32)
        exact = layer.evaluate(x.double(), torch.float64, tensors)
        error = (layer(x).double() - exact).norm()
    assert 0 < float(error) <= float(layer.rounding(x))


def test_certificates_are_for_their_weights_and_images():
    layer, other = perturb(SLLConv2d(3, 2)), perturb(SLLConv2d(3, 2))
    proof = layer.certificate((8, 8))
    layer.check(proof, torch.zeros(1, 3, 8, 8))
    layer.check(proof, torch.zeros(1, 3, 5, 8))
    with pytest.raises(CertificateError, match="for images of"):
        layer.check(proof, torch.zeros(1, 3, 9, 8))
    with pytest.raises(CertificateError, match="for other weights"):
        other.check(proof, torch.zeros(1, 3, 8, 8))
    circular = perturb(SLLConv2d(3, 2, circular=True))
    with pytest.raises(CertificateError, match="for images of"):
        circular.check(circular.certificate((8, 8)), torch.zeros(1, 3, 7, 8))
    with torch.no_grad():
        layer.parameterization.U.mul_(2)
    with pytest.raises(CertificateError, match="for other weights"):
        layer.check(proof, torch.zeros(1, 3, 8, 8))


def test_a_layer_may_be_used_twice_in_one_graph():
    layer = SLLLinear(6, 4, dtype=torch.float64)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: layer(layer(x)), (x,))
    (first,) = torch.autograd.grad(layer(layer(x)).square().sum(), x, create_graph=True)
    first.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_autocast_runs_and_certifies_the_rounded_weights():
    layer = perturb(SLLLinear(8, 12))
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
    U, b, scale = layer.parameterization.compute_in_float64(torch.float32)
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
    layer = perturb((DENSE | CONVOLUTIONAL)[kind]())
    x = sample(layer, 20)
    exact = copy.deepcopy(layer).double()
    weights = layer.parameterization.compute_in_float64(torch.float32)
    y = exact.evaluate(x.double(), torch.float64, weights)
    error = (layer(x).double() - y).flatten(1).norm(dim=1)
    bound = layer.rounding(x).double()
    assert (error <= bound).all()
    assert (bound <= 1e-2 * (1 + x.flatten(1).norm(dim=1))).all()


def test_autocast_to_float16_is_refused():
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match="overflows in T"),
    ):
        SLLLinear(3, 2)(torch.zeros(4, 3))


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
    original, calls = backends.activate, []

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
    pairs = layer.pair_certificate() if isinstance(layer, NormalizedLinear) else None
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert layer.weights().fingerprint == expected
        if isinstance(layer, NormalizedLinear):
            assert layer.pair_certificate() == pairs
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


@pytest.mark.parametrize("image", [(2, 4, 4, 4), "44", 4, (4.0, 4), (2, 4.0, 4)], ids=str)
def test_image_sizes_are_pairs(image):
    with pytest.raises(TypeError, match=r"pair \(height, width\)|must be an integer"):
        SLLConv2d(2, 2).certificate(image)


def test_image_sizes_may_come_with_channels_and_are_no_features():
    layer = SLLConv2d(2, 2)
    assert layer.certificate((2, 4, 5)) == layer.certificate((4, 5))
    with pytest.raises(ValueError, match=r"image=\(height, width\)"):
        layer.certificate((4,))
