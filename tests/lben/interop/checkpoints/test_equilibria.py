"""Equilibrium networks of checkpoints are those of the published formulas."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from lben import CertificateError, EquilibriumClassifier
from lben.interop import load_checkpoint
from lben.interop.checkpoints.equilibria import gamma_in
from lben.models import ImageTask

IN = "mon.linear_module."
MEAN, STD = 0.1307, 0.3081
SMALL = ImageTask(shape=(1, 6, 6), classes=10, mean=(0.5,), std=(0.25,))


def equilibrium(W, v):
    """The z with z = σ(Wz + v), by small steps."""
    steps = 1 / (1 + float(torch.linalg.matrix_norm(torch.eye(len(W)).double() - W, 2)) ** 2)
    z = torch.zeros_like(v)
    for _ in range(20000):
        new = torch.relu(z + steps * (z @ W.T + v - z))
        if float((new - z).abs().max()) < 1e-14:
            break
        z = new
    return z


def draw(*shape, scale=1.0):
    return scale * torch.randn(shape) / math.sqrt(math.prod(shape[1:]) or 1)


def fully_connected(first, second, third, p=784, n=7):
    """Tensors as the projects name them: input, two square ones, output."""
    return {
        f"{IN}{first}.weight": draw(n, p, scale=3), f"{IN}{first}.bias": torch.randn(n),
        f"{IN}{second[0]}.weight": draw(n, n), f"{IN}{second[1]}.weight": draw(n, n),
        f"{third}.weight": draw(10, n), f"{third}.bias": torch.randn(10),
    }  # fmt: skip


def doubles(state):
    return {name.removeprefix(IN): value.double() for name, value in state.items()}


def lben():
    return fully_connected("B", "VS", IN + "G") | {IN + "psi": torch.randn(7) / 2}


def older_lben():
    return fully_connected("B", "VS", IN + "G") | {IN + "Lambda": 0.5 + torch.rand(7)}


def unbounded_lben():
    return fully_connected("U", "VS", "Wout") | {IN + "psi": torch.randn(7) / 2}


def mondeq():
    return fully_connected("U", "AB", "Wout")


def explicit():
    state = doubles(mondeq())
    W = matrix("mondeq", state, 1.0, 20.0)
    return {"W": W, "U": state["U.weight"], "b": state["U.bias"], "C": state["Wout.weight"],
            "b_y": state["Wout.bias"]}  # fmt: skip


def matrix(kind, s, gamma, m):
    """W of the published formulas."""
    n = len(next(s[k] for k in ("V.weight", "A.weight", "W") if k in s))
    I = torch.eye(n).double()  # noqa: E741
    if kind == "explicit":
        return s["W"]
    if kind == "mondeq":
        A, B = s["A.weight"], s["B.weight"]
        return (1 - m) * I - A.T @ A + B - B.T
    V, S = s["V.weight"], s["S.weight"]
    if kind == "lben-unbounded":
        return I - torch.diag(s["psi"].exp()) @ (V.T @ V + m * I + S.T - S)
    B, G = s["B.weight"], s["G.weight"]
    if "psi" in s:
        Psi, inverse = torch.diag(s["psi"].exp()), torch.diag((-s["psi"]).exp())
        bound = G.T @ G / (2 * gamma) + inverse @ B @ B.T @ inverse / (2 * gamma)
        return I - Psi @ (bound + V.T @ V + m * I + S.T - S)
    L = torch.diag(s["Lambda"])
    rest = V.T @ V + m * I + G.T @ G / gamma + L @ B @ B.T @ L / gamma - S.T + S
    return I - torch.linalg.inv(L) @ rest / 2


KINDS = {
    "psi": ("lben", lben), "Lambda": ("lben", older_lben),
    "unbounded": ("lben-unbounded", unbounded_lben), "mondeq": ("mondeq", mondeq),
    "explicit": ("explicit", explicit),
}  # fmt: skip


@pytest.mark.parametrize("m", [1.0, 20.0])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("name", KINDS)
def test_fully_connected_networks_are_those_of_the_formulas(tmp_path, name, suffix, m):
    kind, make = KINDS[name]
    state, gamma = make(), 0.7
    path = tmp_path / f"{kind}.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    options = {} if kind == "explicit" else {"m": m}
    if kind == "lben":
        options["gamma"] = gamma
    model = load_checkpoint(path, **options)
    assert type(model) is EquilibriumClassifier
    s = doubles(state)
    W = matrix(kind, s, gamma, m)
    first, last = ("B", "G") if kind == "lben" else ("U", "Wout")
    if kind == "explicit":
        U, b, C, b_y = (s[name] for name in ("U", "b", "C", "b_y"))
    else:
        U, b, C, b_y = (s[f"{x}.{y}"] for x in (first, last) for y in ("weight", "bias"))
    pixels = torch.rand(4, 1, 28, 28).double()
    x = (pixels.flatten(1) - MEAN) / STD
    expected = equilibrium(W, x @ U.T + b) @ C.T + b_y
    torch.testing.assert_close(model.to_exact(1e-11)(pixels), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(model.layer.weights().W, W, rtol=1e-13, atol=1e-13)
    if kind == "lben":
        assert model.certificate().bound == pytest.approx(gamma / STD)
    else:
        assert model.certificate().bound == math.inf
        assert model.certificate(bound="diagonal").bound < math.inf


def test_gamma_stands_in_the_name_of_the_file(tmp_path):
    assert gamma_in("fc_lip0.5_w80.params") == 0.5
    assert gamma_in("lben_mon_lip10_w80.safetensors") == 10
    assert gamma_in("full_conv_w81_L2.0.params") == 2
    assert gamma_in("fc_lip0.2_w80_eps0.5.params") == 0.2
    assert gamma_in("mon_w80.params") is None
    assert gamma_in("LBEN_model3.pt") is None
    state = lben()
    torch.save(state, tmp_path / "fc_lip2.0_w7.params")
    named = load_checkpoint(tmp_path / "fc_lip2.0_w7.params")
    given = load_checkpoint(state, gamma=2.0)
    assert named.layer.weights().fingerprint == given.layer.weights().fingerprint
    assert load_checkpoint(tmp_path / "fc_lip2.0_w7.params", gamma=3.0).gamma == 3


def test_a_bound_that_is_not_given_is_asked_for(tmp_path):
    torch.save(lben(), tmp_path / "model.pt")
    for source in (tmp_path / "model.pt", lben()):
        with pytest.raises(ValueError, match=r"depends on its bound γ.*lip0.5 is gamma=0.5"):
            load_checkpoint(source)
    with pytest.raises(ValueError, match="a positive number"):
        load_checkpoint(lben(), gamma=-1.0)


def test_a_claim_of_a_checkpoint_is_proved_and_not_believed():
    state = lben()
    model = load_checkpoint(state, gamma=0.5, m=-40.0)
    with pytest.raises(CertificateError):
        model.certificate()


def test_a_multiplier_that_is_not_positive_is_named():
    state = older_lben()
    state[IN + "Lambda"][3] = 0
    with pytest.raises(ValueError, match="Lambda must be positive"):
        load_checkpoint(state, gamma=1.0)


@pytest.mark.parametrize("name", KINDS)
def test_a_tensor_that_is_missing_superfluous_or_of_another_shape_is_named(name):
    kind, make = KINDS[name]
    options = {"gamma": 1.0} if kind == "lben" else {}
    state = make()
    for key in state:
        with pytest.raises(ValueError, match="needs a tensor"):
            load_checkpoint({k: v for k, v in state.items() if k != key}, kind, **options)
        with pytest.raises(ValueError, match="shape"):
            load_checkpoint(state | {key: torch.randn(3, 3, 3)}, kind, **options)
        with pytest.raises(ValueError, match="NaN"):
            load_checkpoint(state | {key: torch.full_like(state[key], math.nan)}, kind, **options)
    with pytest.raises(ValueError, match="has no extra"):
        load_checkpoint(state | {"extra": torch.ones(2)}, **options)


def test_images_that_are_not_known_are_given():
    state = fully_connected("U", "AB", "Wout", p=36)
    with pytest.raises(ValueError, match=r"36 inputs and 10 outputs.*task=ImageTask"):
        load_checkpoint(state)
    model = load_checkpoint(state, task=SMALL)
    assert model.shape == (1, 6, 6)
    with pytest.raises(ValueError, match="does not fit images"):
        load_checkpoint(mondeq(), task=SMALL)
    colours = load_checkpoint(fully_connected("U", "AB", "Wout", p=3072))
    assert colours.shape == (3, 32, 32)
    assert colours.normalize.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])


# Convolutions


def on_torus(kernel, side):
    """The matrix of a circular convolution of images side × side."""
    inputs = kernel.shape[1] * side * side
    basis = torch.eye(inputs).double().reshape(inputs, -1, side, side)
    image = functional.conv2d(functional.pad(basis, [1] * 4, mode="circular"), kernel)
    return image.flatten(1).T


def plane(kernel, side):
    """UUᵀ of a convolution on a plane without borders, between the pixels of an image."""
    inputs = kernel.shape[0] * side * side
    basis = torch.eye(inputs).double().reshape(inputs, -1, side, side)
    image = functional.conv2d(functional.conv_transpose2d(basis, kernel), kernel)
    return image.flatten(1).T


def convolutional(n=2, channels=1, output="Wout", metric=None, cells=2):
    state = {
        IN + "U.weight": draw(n, channels, 3, 3, scale=2), IN + "U.bias": torch.randn(n),
        IN + "A.weight": draw(n, n, 3, 3), IN + "B.weight": draw(n, n, 3, 3),
        IN + "g": torch.tensor(1.3), IN + "h": torch.tensor(-0.6),
        f"{output}.weight": draw(10, n * cells * cells), f"{output}.bias": torch.randn(10),
    }  # fmt: skip
    if metric is not None:
        state[IN + "psi"] = 0.4 * torch.randn(metric)
    return state


def published(state, x, pool, gamma, m):
    """The logits of normalised images by the formulas, on the torus with its border."""
    s = doubles(state)
    n, side = len(s["U.bias"]), x.shape[-1] + 2
    units = n * side * side
    scaled = "u" in s
    vt, st = ("a", "b") if scaled else ("g", "h")
    A = on_torus(s["A.weight"] / s["A.weight"].norm(), side)
    B = on_torus(s[st] * s["B.weight"] / s["B.weight"].norm(), side)
    U, G = s["U.weight"], s["Wout.weight"]
    if scaled:
        U = s["u"].sqrt() * U / U.norm()
        G = s["g"].sqrt() * G / G.norm()
    psi = s.get("psi", torch.zeros(1).double())
    Psi = torch.ones(units).double()
    if psi.numel() > 1:
        Psi = psi.exp().reshape(-1, *psi.shape[-2:]).expand(n, side, side).flatten()
    Psi = torch.diag(Psi)
    basis = torch.eye(units).double().reshape(units, n, side, side)
    P = functional.avg_pool2d(basis, pool).flatten(1).T
    I = torch.eye(units).double()  # noqa: E741
    inner = m * I + s[vt] * A.T @ A - B + B.T
    W = I - Psi @ inner
    if gamma is not None:
        GP = G @ P
        W = W - plane(U, side) @ torch.linalg.inv(Psi) / (2 * gamma) - Psi @ GP.T @ GP / (2 * gamma)
    border = torch.zeros(n, side, side).double()
    border[:, 1:-1, 1:-1] = 1
    inside = border.flatten().bool()
    framed = functional.pad(x, [1] * 4)
    v = functional.conv2d(functional.pad(framed, [1] * 4, mode="circular"), U, s["U.bias"])
    z = torch.zeros(len(x), units).double()
    z[:, inside] = equilibrium(W[inside][:, inside], v.flatten(1)[:, inside])
    return z @ (G @ P).T + s["Wout.bias"]


@pytest.mark.parametrize("pool", [3, 4])
@pytest.mark.parametrize(
    "metric", [None, (1, 2, 1, 1), (1, 1, 1, 1), (2, 1, 1), (1, 2, 8, 8), (2, 8, 8), (1, 1, 8, 8)]
)
def test_convolutional_networks_without_a_bound_are_those_of_the_formulas(metric, pool):
    state = convolutional(metric=metric)
    model = load_checkpoint(state, task=SMALL, m=0.8, pool=pool)
    pixels = torch.rand(3, 1, 6, 6).double()
    expected = published(state, (pixels - 0.5) / 0.25, pool, None, 0.8)
    torch.testing.assert_close(model.to_exact(1e-11)(pixels), expected, rtol=1e-6, atol=1e-6)
    assert model.certificate().bound == math.inf


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("metric", [(1, 2, 1, 1), (1, 1, 1, 1), (2, 8, 8), (1, 1, 8, 8)])
def test_convolutional_networks_with_a_bound_are_those_of_the_formulas(metric, scaled):
    state, gamma = convolutional(output=IN + "Wout", metric=metric), 0.9
    if scaled:
        del state[IN + "h"]
        state |= {IN + x: torch.tensor(v) for x, v in (("a", 0.7), ("b", 0.4), ("u", 2.0))}
    model = load_checkpoint(state, task=SMALL, gamma=gamma, pool=4)
    pixels = torch.rand(3, 1, 6, 6).double()
    expected = published(state, (pixels - 0.5) / 0.25, 4, gamma, 0.1)
    torch.testing.assert_close(model.to_exact(1e-11)(pixels), expected, rtol=1e-6, atol=1e-6)
    assert model.certificate().bound == pytest.approx(gamma / 0.25)


def test_images_of_mnist_and_cifar_are_known_by_their_channels():
    assert load_checkpoint(convolutional(cells=7)).shape == (1, 28, 28)
    assert load_checkpoint(convolutional(channels=3, cells=17)).shape == (3, 32, 32)
    with pytest.raises(ValueError, match="task=ImageTask"):
        load_checkpoint(convolutional(channels=2))
    with pytest.raises(ValueError, match=r"of the sizes \[16, 17, .*: give pool="):
        load_checkpoint(convolutional(cells=1))
    with pytest.raises(ValueError, match=r"of the sizes \[3, 4\].*got pool=2"):
        load_checkpoint(convolutional(), task=SMALL, pool=2)
    with pytest.raises(ValueError, match=r"of the sizes \[\]"):
        load_checkpoint(convolutional(cells=29))


def test_a_multiplier_per_pixel_is_read_where_a_matrix_fits():
    with pytest.raises(ValueError, match="18816 × 18816 entries"):
        load_checkpoint(convolutional(n=24, cells=7, metric=(1, 24, 30, 30)))
    for shape in ((1, 2, 9, 9), (2, 1, 8, 8), (8, 8), (1, 3, 1, 1)):
        with pytest.raises(ValueError, match="psi"):
            load_checkpoint(convolutional(metric=shape), task=SMALL, pool=4)


def test_a_kernel_of_zeros_is_named():
    state = convolutional()
    state[IN + "A.weight"].zero_()
    with pytest.raises(ValueError, match=r"A.weight is zero"):
        load_checkpoint(state, task=SMALL)


def test_multi_tier_networks_are_refused_by_name():
    with pytest.raises(ValueError, match="multi-tier"):
        load_checkpoint({IN + "A0.0.weight": torch.ones(2, 2, 3, 3)})
