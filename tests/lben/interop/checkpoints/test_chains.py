"""Chains of 1-Lipschitz layers of checkpoints are those of the published formulas."""

import itertools
import math

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from lben import LipschitzSequential
from lben.interop import load_checkpoint
from lben.interop.checkpoints.chains import ChainClassifier, FirstChannels, MaxMin
from lben.models import FeedforwardClassifier, ImageTask

SMALL = ImageTask(shape=(3, 8, 8), classes=4, mean=(0.4, 0.5, 0.6), std=(1.0,) * 3)


def draw(*shape):
    return torch.randn(shape) / math.sqrt(math.prod(shape[1:]))


def same(model, published, pixels):
    """The published logits, up to the slack of the multipliers; quotients keep the bound."""
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), published, rtol=2e-4, atol=2e-4)
        slack = (model(pixels) - published).abs().max()
    assert slack < 2e-5 * len(list(model.modules()))


# SLL


def sll(convolutions=2, dense=2, channels=5, inner=3, units=6, classes=4):
    features = channels * 4
    state = {}
    for i in range(1, convolutions + 1):
        state |= {
            f"{i}.kernel": draw(inner, channels, 3, 3),
            f"{i}.bias": torch.randn(1, inner, 1, 1),
            f"{i}.q": torch.randn(inner),
        }
    start = convolutions + 3
    for i in range(start, start + dense):
        state |= {f"{i}.weight": draw(units, features), f"{i}.bias": torch.randn(1, units),
                  f"{i}.q": torch.randn(units)}  # fmt: skip
    last = start + dense
    state |= {
        f"{last}.weight": torch.randn(classes, features),
        f"{last}.bias": torch.randn(classes),
    }
    return {f"module.model.model.{name}": value for name, value in state.items()}


def published_sll(state, x, convolutions=2, dense=2):
    s = {k.removeprefix("module.model.model."): v.double() for k, v in state.items()}
    channels = s["1.kernel"].shape[1]
    x = functional.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))
    for i in range(1, convolutions + 1):
        K, b, q = (s[f"{i}.{k}"] for k in ("kernel", "bias", "q"))
        G = torch.zeros(len(K), len(K)).double()
        correlated = functional.conv2d(K, K, padding=2).abs()
        G = correlated.sum((2, 3))
        T = (G * q.exp()[None] / q.exp()[:, None]).sum(1)
        h = torch.relu(functional.conv2d(x, K, padding=1) + b) / T[:, None, None]
        x = x - 2 * functional.conv_transpose2d(h, K, padding=1)
    x = (4 * functional.avg_pool2d(x, 4)).flatten(1)
    for i in range(convolutions + 3, convolutions + 3 + dense):
        U, b, q = (s[f"{i}.{k}"] for k in ("weight", "bias", "q"))
        T = ((U @ U.T).abs() * q.exp()[None] / q.exp()[:, None]).sum(1)
        x = x - 2 * (torch.relu(x @ U.T + b) / T) @ U
    Q = s[f"{convolutions + 3 + dense}.weight"]
    return x @ (Q / Q.norm(dim=1, keepdim=True)).T + s[f"{convolutions + 3 + dense}.bias"]


@pytest.mark.parametrize("dense", [0, 2])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_sll_is_that_of_the_formulas(tmp_path, suffix, dense):
    state, path = sll(dense=dense), tmp_path / f"model.{suffix}"
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model_state_dict": state, "epoch": 3, "optimizer_state_dict": {}}, path)
    model = load_checkpoint(path, task=SMALL)
    assert type(model) is FeedforwardClassifier
    pixels = torch.rand(4, 3, 8, 8).double()
    x = pixels - torch.tensor(SMALL.mean).double()[:, None, None]
    same(model, published_sll(state, x, dense=dense), pixels)
    certificate = model.certificate()
    assert certificate.bound < 1.5
    assert len(certificate.pairs) == 4
    labels = model(pixels).argmax(1)
    assert bool((model.certified_radius(pixels, labels, certificate) > 0).any())


def test_images_of_sll_are_known_by_sizes():
    state = sll(channels=5, classes=10)
    state = {
        k: v
        for k, v in state.items()
        if ".kernel" in k or k.count("model.1.") or k.count("model.2.")
    }
    features = 5 * 64
    state |= {"module.model.model.5.weight": torch.randn(10, features),
              "module.model.model.5.bias": torch.randn(10)}  # fmt: skip
    model = load_checkpoint(state)
    assert model.shape == (3, 32, 32)
    assert model.normalize.std.flatten().tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="no data set of its project"):
        load_checkpoint(sll(classes=7))


# LBDN


def cayley(V):
    """Rows that are orthonormal, by the definition with a skew-symmetric matrix of full size."""
    q = len(V)
    W = V.T
    U, R = W[:q], W[q:]
    A = U - U.T + R.T @ R
    inverse = torch.linalg.inv(torch.eye(q).double() + A)
    return torch.cat([inverse @ (torch.eye(q).double() - A), -2 * R @ inverse]).T


def lbdn(sizes=(12, 7, 9, 4), rows_only=False, start=0):
    state = {}
    for k, (p, q) in enumerate(itertools.pairwise(sizes)):
        i, last = start + k, k == len(sizes) - 2
        if last and rows_only:
            state |= {f"{i}.weight": torch.randn(q, p), f"{i}.bias": torch.randn(q)}
            break
        state |= {f"{i}.weight": draw(q, p + q), f"{i}.bias": torch.randn(q),
                  f"{i}.alpha": 0.5 + torch.rand(())}  # fmt: skip
        if not last:
            state[f"{i}.psi"] = torch.randn(q) / 2
    return {f"model.{name}": value for name, value in state.items()}


def published_lbdn(state, x, gamma, start=0):
    s = {k.removeprefix("model."): v.double() for k, v in state.items()}
    count = len({k.split(".")[0] for k in s})
    rows_only = f"{start + count - 1}.alpha" not in s
    g = math.sqrt(gamma)
    for k in range(count):
        i = start + k
        V, b = s[f"{i}.weight"], s[f"{i}.bias"]
        scale = (g if k == 0 else 1) * (g if k == count - (2 if rows_only else 1) else 1)
        if f"{i}.alpha" not in s:
            x = x @ (V / V.norm(dim=1, keepdim=True)).T + b
            continue
        Q = cayley(s[f"{i}.alpha"] * V / V.norm())
        A, B = Q[:, : len(Q)], Q[:, len(Q) :]
        x = scale * x @ B.T
        if f"{i}.psi" in s:
            psi = s[f"{i}.psi"].exp()
            x = math.sqrt(2) * (psi * torch.relu(math.sqrt(2) * x / psi + b)) @ A
        else:
            x = x + b
    return x


@pytest.mark.parametrize("rows_only", [False, True])
@pytest.mark.parametrize("sizes", [(12, 7, 9, 4), (12, 7, 4)])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 10.0])
def test_lbdn_is_that_of_the_formulas(tmp_path, gamma, sizes, rows_only):
    state = lbdn(sizes, rows_only)
    torch.save(state, tmp_path / "model.ckpt")
    model = load_checkpoint(tmp_path / "model.ckpt", gamma=gamma)
    assert type(model) is LipschitzSequential
    x = torch.randn(5, 12).double()
    for layer in model:
        if hasattr(layer, "tol"):
            layer.tol = 1e-12
    with torch.no_grad():
        torch.testing.assert_close(model(x), published_lbdn(state, x, gamma), rtol=1e-8, atol=1e-8)
    certificate = model.certificate((12,))
    bound = gamma * (2 if rows_only else 1)  # rows of norm 1 have a norm of at most √q
    assert certificate.bound <= bound * 1.0001
    found = model.forward_with_error(x, certificate)
    assert bool((found.error < 1e-6).all())


def test_lbdn_of_images_is_a_classifier():
    task = ImageTask(shape=(3, 2, 2), classes=4, mean=(0.5,) * 3, std=(0.5,) * 3)
    state = lbdn(start=1, rows_only=True)
    model = load_checkpoint(state, gamma=2.0, task=task)
    assert type(model) is ChainClassifier
    pixels = torch.rand(6, 3, 2, 2).double()
    expected = published_lbdn(state, (pixels.flatten(1) - 0.5) / 0.5, 2.0, start=1)
    torch.testing.assert_close(model.to_exact(1e-11)(pixels), expected, rtol=1e-7, atol=1e-7)
    certificate = model.certificate()
    assert len(certificate.pairs) == 4
    radius = model.certified_radius(pixels, expected.argmax(1), certificate)
    assert bool((radius > 0).any())
    assert model.gamma == 2
    with pytest.raises(ValueError, match="does not fit images"):
        load_checkpoint(state, gamma=2.0, task=SMALL)


def lbdn_of_images(rows_only=False):
    """Two convolutions, the second of stride 2, two dense layers, and the last one."""

    def one(i, p, q, *size):
        return {
            f"model.{i}.weight": draw(q, p + q, *size),
            f"model.{i}.bias": torch.randn(q),
            f"model.{i}.alpha": 2 + torch.rand(()),
            f"model.{i}.psi": torch.randn(q) / 2,
        }

    state = one(0, 3, 4, 3, 3) | one(1, 16, 5, 1, 1) | one(3, 80, 6) | one(4, 6, 7)
    if rows_only:
        return state | {"model.5.weight": torch.randn(4, 7), "model.5.bias": torch.randn(4)}
    end = one(5, 7, 4)
    del end["model.5.psi"]
    return state | end


def published_convolution(s, prefix, x, scale):
    """A sandwich layer at every frequency of half the spectrum."""
    V, psi, b = s[prefix + "weight"], s[prefix + "psi"], s[prefix + "bias"]
    q, both, k, _ = V.shape
    n = x.shape[-1]
    position = torch.arange(n)[:, None] + torch.arange(n)[None, :]
    shift = torch.exp(-2j * math.pi * ((k - 1) // 2) * position / n)[:, : n // 2 + 1]
    spectrum = shift * torch.fft.rfft2(V, (n, n)).conj()
    spectrum = s[prefix + "alpha"] * spectrum / spectrum.abs().square().sum().sqrt()
    inner = torch.zeros(len(x), q, n, n // 2 + 1, dtype=torch.complex128)
    Q = torch.zeros(n, n // 2 + 1, q, both, dtype=torch.complex128)
    x_hat = torch.fft.rfft2(scale * x)
    for i in range(n):
        for j in range(n // 2 + 1):
            W = spectrum[:, :, i, j].T
            U, R = W[:q], W[q:]
            S = U - U.conj().T + R.conj().T @ R
            inverse = torch.linalg.inv(torch.eye(q) + S)
            Q[i, j] = torch.cat([inverse @ (torch.eye(q) - S), -2 * R @ inverse]).T
            inner[:, :, i, j] = x_hat[:, :, i, j] @ Q[i, j, :, q:].T
    v = math.sqrt(2) * torch.fft.irfft2(inner, (n, n)) / psi.exp()[:, None, None]
    h = torch.fft.rfft2(torch.relu(v + b[:, None, None]) * psi.exp()[:, None, None])
    out = math.sqrt(2) * torch.einsum("ijqr,bqij->brij", Q[..., :q].conj(), h)
    return torch.fft.irfft2(out, (n, n))


@pytest.mark.parametrize("rows_only", [False, True])
def test_lbdn_with_convolutions_is_that_of_the_formulas(rows_only):
    state, gamma = lbdn_of_images(rows_only), 1.7
    model = load_checkpoint(state, gamma=gamma, task=SMALL)
    assert type(model) is ChainClassifier
    pixels = torch.rand(3, 3, 8, 8).double()
    s = {k.removeprefix("model."): v.double() for k, v in state.items()}
    x = pixels - torch.tensor(SMALL.mean).double()[:, None, None]
    x = published_convolution(s, "0.", x, math.sqrt(gamma))
    x = published_convolution(s, "1.", functional.pixel_unshuffle(x, 2), 1.0)
    dense = {k: v for k, v in state.items() if k.split(".")[1] in "345"}
    # The dense part has its own first layer, whose input is not scaled here.
    x = x.flatten(1) / math.sqrt(gamma)
    expected = published_lbdn(dense, x, gamma, start=3)
    torch.testing.assert_close(model.to_exact(1e-11)(pixels), expected, rtol=1e-7, atol=1e-7)
    certificate = model.certificate()
    assert certificate.bound <= gamma * (2 if rows_only else 1) * 1.0001
    radius = model.certified_radius(pixels, expected.argmax(1), certificate)
    assert bool((radius > 0).any())


def test_images_of_lbdn_are_known_or_given():
    with pytest.raises(ValueError, match=r"give square images, task=ImageTask"):
        load_checkpoint(lbdn_of_images(), gamma=1.0)
    wrong = ImageTask(shape=(1, 8, 8), classes=4, mean=(0.5,), std=(1.0,))
    with pytest.raises(ValueError, match=r"its input has 1, or 4 with stride 2"):
        load_checkpoint(lbdn_of_images(), gamma=1.0, task=wrong)


def test_what_lbdn_lacks_is_named():
    with pytest.raises(ValueError, match=r"multiplied by √γ.*gamma=…"):
        load_checkpoint(lbdn())
    with pytest.raises(ValueError, match="convolutions before dense layers"):
        load_checkpoint(lbdn() | {"model.1.weight": torch.randn(9, 16, 3, 3)}, gamma=1.0)
    with pytest.raises(ValueError, match="one last layer, got 2 and 0"):
        state = {k: v for k, v in lbdn().items() if not k.startswith("model.2.")}
        load_checkpoint(state, gamma=1.0)
    with pytest.raises(ValueError, match="7 columns for 7 outputs"):
        load_checkpoint(lbdn() | {"model.0.weight": torch.randn(7, 7)}, gamma=1.0)


# 1LipschitzLayersCompared


def compared(layer, width=4, blocks=2, depth=2):
    def one(prefix, channels, size):
        kernel = draw(channels, channels, size, size)
        state = {prefix + "bias": torch.randn(channels) / 3}
        if layer == "AOL":
            return state | {prefix + "parametrizations.weight.original": kernel}
        return state | {prefix + "kernel": kernel, prefix + "q": torch.randn(channels)}

    state = one("FirstConv.", width, 1)
    for i in range(1, blocks + 1):
        for j in range(depth):
            state |= one(f"Block{i}.{2 * j}.", width, 1 if i == blocks else 3)
        width *= 2
    return state | one("ClassificationHead.0.", width, 1)


def published_compared(state, x, classes):
    s = {k: v.double() for k, v in state.items()}

    def layer(prefix, x):
        b = s[prefix + "bias"][:, None, None]
        if prefix + "q" in s:
            K, q = s[prefix + "kernel"], s[prefix + "q"].abs() + 1e-6
            k = K.shape[-1]
            G = functional.conv2d(K, K, padding=k - 1).abs().sum((2, 3))
            T = (G * q[None]).sum(1) / q + 1e-6
            h = torch.relu(functional.conv2d(x, K, padding=k // 2) + b)
            return x - functional.conv_transpose2d(2 * h / T[:, None, None], K, padding=k // 2)
        V = s[prefix + "parametrizations.weight.original"]
        k = V.shape[-1]
        Vt = V.transpose(0, 1)
        T = functional.conv2d(Vt, Vt, padding=k - 1).abs().sum((1, 2, 3)) + 1e-6
        x = functional.pad(x, [k // 2] * 4, mode="circular")
        return functional.conv2d(x, V / T.sqrt()[None, :, None, None]) + b

    def maxmin(x):
        a, b = x[:, ::2], x[:, 1::2]
        return torch.stack([torch.maximum(a, b), torch.minimum(a, b)], 2).flatten(1, 2)

    width = len(s["FirstConv.bias"])
    x = functional.pad(x, (0, 0, 0, 0, 0, width - x.shape[1]))
    x = maxmin(layer("FirstConv.", x))
    i = 1
    while f"Block{i}.0.bias" in s:
        j = 0
        while f"Block{i}.{j}.bias" in s:
            x = maxmin(layer(f"Block{i}.{j}.", x))
            j += 2
        x = functional.pixel_unshuffle(x[:, : x.shape[1] // 2], 2)
        i += 1
    return layer("ClassificationHead.0.", x).amax((2, 3))[:, :classes]


@pytest.mark.parametrize("layer", ["AOL", "SLL"])
@pytest.mark.parametrize("small", [False, True])
def test_compared_networks_are_those_of_the_formulas(tmp_path, layer, small):
    state = compared(layer, blocks=3)
    if small:  # there the number that is added to T counts
        state |= {
            k: 1e-3 * v for k, v in state.items() if k.startswith("Block1.0.") and v.ndim == 4
        }
    save_file(state, tmp_path / "model.safetensors")
    model = load_checkpoint(tmp_path / "model.safetensors", task=SMALL)
    assert type(model) is ChainClassifier
    pixels = torch.rand(4, 3, 8, 8).double()
    x = pixels - torch.tensor(SMALL.mean).double()[:, None, None]
    same(model, published_compared(state, x, 4), pixels)
    certificate = model.certificate()
    assert certificate.bound == pytest.approx(1, abs=1e-3)
    assert certificate.pairs[0][1] == pytest.approx(math.sqrt(2), abs=1e-3)
    assert model.gamma == 1
    labels = model(pixels).argmax(1)
    radius = model.certified_radius(pixels, labels, certificate)
    assert radius.shape == (4,)
    assert bool((radius > 0).any())
    single = model.float()
    assert single.certificate().bound == pytest.approx(1, abs=1e-3)
    assert bool((single.certified_radius(pixels.float(), labels) > 0).any())


def test_images_of_compared_networks_are_known_by_the_blocks():
    assert load_checkpoint(compared("SLL", blocks=5)).shape == (3, 32, 32)
    with pytest.raises(ValueError, match=r"for images of 4 × 4 pixels"):
        load_checkpoint(compared("SLL", blocks=2))
    with pytest.raises(ValueError, match=r"for images of 4 × 4 pixels"):
        load_checkpoint(compared("SLL", blocks=2), task=SMALL)


def test_other_layers_are_refused_by_name():
    with pytest.raises(ValueError, match="AOLConv2d and SLLConv2d are read"):
        load_checkpoint({"FirstConv.weight": torch.ones(2, 2, 1, 1)})


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (sll, {"task": SMALL}),
        (lbdn, {"gamma": 1.0}),
        (lbdn_of_images, {"gamma": 1.0, "task": SMALL}),
        (lambda: compared("SLL", blocks=3), {"task": SMALL}),
        (lambda: compared("AOL", blocks=3), {"task": SMALL}),
    ],
    ids=["SLL", "LBDN", "LBDN of images", "compared SLL", "compared AOL"],
)
def test_a_tensor_that_is_missing_superfluous_or_of_another_shape_is_named(make, options):
    state = make()
    for key in state:
        with pytest.raises(ValueError, match=r"needs a tensor|has no|has \d|known|got|are read"):
            load_checkpoint({k: v for k, v in state.items() if k != key}, **options)
        with pytest.raises(ValueError, match=r"shape|columns|convolutions|fit"):
            load_checkpoint(state | {key: torch.randn(3, 1, 2, 3, 2)}, **options)
        with pytest.raises(ValueError, match="NaN"):
            load_checkpoint(state | {key: torch.full_like(state[key], math.nan)}, **options)
    with pytest.raises(ValueError, match=r"has no |got"):
        load_checkpoint(state | {next(iter(state)) + ".more": torch.ones(2)}, **options)


def test_maps_have_the_bound_one_and_no_rounding():
    x = torch.randn(2, 6, 3, 3)
    assert torch.equal(FirstChannels(2)(x), x[:, :2])
    y = MaxMin()(x)
    assert bool((y[:, ::2] >= y[:, 1::2]).all())
    assert torch.equal(y.sort(dim=1).values, x.sort(dim=1).values)
    for module in (FirstChannels(2), MaxMin()):
        certificate = module.certificate()
        assert certificate.bound == 1
        found = module.forward_with_error(x, certificate)
        assert bool((found.error < 1e-30).all())
