"""Which equilibrium network does a checkpoint hold? LBEN, monDEQ, or W, U, b, C written out.

Each formula is evaluated in float64 from the numbers of the file. The network that is returned and
proved has the W, U and C that result.

Note [Names]
The glossary's symbols are used here, and the files have others. In files of LBEN, U is called B and
C is called G; V and S are as here. In files of monDEQ, V is called A and S is called −B.

Note [Border]
The convolutions of both projects run on a torus that is two pixels larger than the image. Their
activation sets the outermost pixels to 0. W reaches two pixels, and the way around the torus from
one pixel inside the border to another is three pixels at least. So inside, W and U are the
convolutions of images surrounded by zeros, as `ConvolutionalWeights` has them. The pooling counts
its windows from the border.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor
from torch.nn import functional

from lben.interop.checkpoints.files import Tensors
from lben.interop.checkpoints.tasks import CIFAR10, MNIST, task_for
from lben.models import ConvolutionalEquilibriumClassifier, EquilibriumClassifier, ImageTask
from lben.weights import ConvolutionalWeights, DenseWeights, PooledWeights
from lben.weights.image import ImageGeometry
from lben.weights.linear_maps import mirror, taps

MODULE = "mon.linear_module."
_MOST_UNITS = 2**13
"""Of a network of images whose W is no convolution: a matrix of 512 MiB."""


def gamma_in(name: str) -> float | None:
    """Return the γ that the LBEN repository writes into the name of a file, or None.

    Args:
        name: of the file, such as fc_lip0.5_w80.params or full_conv_w81_L2.0.params.
    """
    found = re.search(r"(?:^|_)(?:lip|L)(\d+(?:\.\d+)?)(?=[_. ]|$)", name)
    return float(found[1]) if found else None


def read_explicit(tensors: Tensors, *, task: ImageTask | None = None) -> EquilibriumClassifier:
    """Return the network of W, U, b, C and b_y, as SemiMonDEQ and CRAFT have them."""
    U = tensors.take("U", None, None)
    W, b = tensors.take("W", len(U), len(U)), tensors.take("b", len(U))
    C = tensors.take("C", None, len(U))
    b_y = tensors.take("b_y", len(C))
    tensors.finish()
    return _dense(W, U, b, C, b_y, torch.ones_like(b), None, task)


def read_mondeq(
    tensors: Tensors, *, m: float = 1.0, task: ImageTask | None = None
) -> EquilibriumClassifier:
    """Return monDEQ: W = (1 − m)I − VᵀV + S − Sᵀ. Winston and Kolter (2020)."""
    U, b = _affine(tensors, MODULE + "U")
    n = len(b)
    V = tensors.take(MODULE + "A.weight", n, n)
    S = tensors.take(MODULE + "B.weight", n, n)
    C, b_y = _affine(tensors, "Wout", inputs=n)
    tensors.finish()
    W = (1 - m) * torch.eye(n, dtype=V.dtype) - V.T @ V + S - S.T
    return _dense(W, U, b, C, b_y, torch.ones_like(b), None, task)


def read_lben(
    tensors: Tensors,
    *,
    gamma: float | None = None,
    m: float = 1.0,
    task: ImageTask | None = None,
) -> EquilibriumClassifier:
    """Return LBEN with a bound: W = I − Λ⁻¹(½CᵀC/γ + ½ΛUUᵀΛ/γ + VᵀV + mI + Sᵀ − S).

    Here Λ⁻¹ = diag(exp ψ) for files with psi. Files of the older scaling have Λ itself, and
    ½(VᵀV + mI + S − Sᵀ) in place of VᵀV + mI + Sᵀ − S.
    """
    gamma = _need_gamma(gamma)
    U, b = _affine(tensors, MODULE + "B")
    n = len(b)
    V, S = (tensors.take(MODULE + name, n, n) for name in ("V.weight", "S.weight"))
    C, b_y = _affine(tensors, MODULE + "G", inputs=n)
    identity = torch.eye(n, dtype=V.dtype)
    monotone = V.T @ V + m * identity
    if MODULE + "psi" in tensors:
        Lambda = torch.exp(-tensors.take(MODULE + "psi", n))
        monotone = monotone + S.T - S
    else:
        Lambda = tensors.take(MODULE + "Lambda", n)
        if not bool((Lambda > 0).all()):
            raise ValueError(f"{MODULE}Lambda must be positive: the file is damaged")
        monotone = (monotone + S - S.T) / 2
    tensors.finish()
    G = Lambda[:, None] * U
    W = identity - (C.T @ C / (2 * gamma) + G @ G.T / (2 * gamma) + monotone) / Lambda[:, None]
    return _dense(W, U, b, C, b_y, Lambda, gamma, task)


def read_unbounded_lben(
    tensors: Tensors, *, m: float = 1.0, task: ImageTask | None = None
) -> EquilibriumClassifier:
    """Return LBEN without a bound: W = I − Λ⁻¹(VᵀV + mI + Sᵀ − S) with Λ⁻¹ = diag(exp ψ)."""
    U, b = _affine(tensors, MODULE + "U")
    n = len(b)
    V, S = (tensors.take(MODULE + name, n, n) for name in ("V.weight", "S.weight"))
    Lambda = torch.exp(-tensors.take(MODULE + "psi", n))
    C, b_y = _affine(tensors, "Wout", inputs=n)
    tensors.finish()
    identity = torch.eye(n, dtype=V.dtype)
    W = identity - (V.T @ V + m * identity + S.T - S) / Lambda[:, None]
    return _dense(W, U, b, C, b_y, Lambda, None, task)


def read_convolutional_mondeq(
    tensors: Tensors, *, m: float = 1.0, pool: int | None = None, task: ImageTask | None = None
) -> ConvolutionalEquilibriumClassifier | EquilibriumClassifier:
    """Return monDEQ of images: W = (1 − m)I − gVᵀV + S − Sᵀ with ‖V‖_F = 1, ‖S‖_F = h.

    V, S and U are 3 × 3 convolutions. The states are averaged over windows, a matrix follows.
    """
    U, b = _convolution(tensors, "U")
    monotone = _monotone(tensors, len(b), m, ("g", "h"))
    G, b_y = _affine(tensors, "Wout")
    tensors.finish()
    return _pooled(U, b, G, b_y, monotone, torch.ones_like(b), None, pool, task)


def read_convolutional_lben(
    tensors: Tensors, *, m: float = 0.1, pool: int | None = None, task: ImageTask | None = None
) -> ConvolutionalEquilibriumClassifier | EquilibriumClassifier:
    """Return LBEN of images without a bound: W = I − Λ⁻¹(mI + gVᵀV − S + Sᵀ)."""
    U, b = _convolution(tensors, "U")
    monotone = _monotone(tensors, len(b), m, ("g", "h"))
    Lambda = _multiplier(tensors, len(b))
    G, b_y = _affine(tensors, "Wout")
    tensors.finish()
    return _pooled(U, b, G, b_y, monotone, Lambda, None, pool, task)


def read_bounded_convolutional_lben(
    tensors: Tensors,
    *,
    gamma: float | None = None,
    m: float = 0.1,
    pool: int | None = None,
    task: ImageTask | None = None,
) -> ConvolutionalEquilibriumClassifier | EquilibriumClassifier:
    """Return LBEN of images with a bound.

    W = I − Λ⁻¹(½CᵀC/γ + ½ΛUUᵀΛ/γ + mI + gVᵀV − S + Sᵀ), where C is the pooling times a matrix. In
    files with scales a, b, g and u, U and the matrix have the squared norms u and g.
    """
    gamma = _need_gamma(gamma)
    U, b = _convolution(tensors, "U")
    scaled = MODULE + "u" in tensors
    monotone = _monotone(tensors, len(b), m, ("a", "b") if scaled else ("g", "h"))
    Lambda = _multiplier(tensors, len(b))
    G, b_y = _affine(tensors, MODULE + "Wout")
    if scaled:
        U = _root(tensors, "u") * U / U.norm()
        G = _root(tensors, "g") * G / G.norm()
    tensors.finish()
    return _pooled(U, b, G, b_y, monotone, Lambda, gamma, pool, task)


def _need_gamma(gamma: float | None) -> float:
    if gamma is None or not 0 < gamma < math.inf:
        raise ValueError(
            "W of this network depends on its bound γ, which is not in the file: give it, gamma=…, "
            "a positive number. The LBEN repository writes it into the file's name (lip0.5 is "
            f"gamma=0.5); got {gamma}"
        )
    return float(gamma)


def _affine(tensors: Tensors, name: str, inputs: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of a torch.nn.Linear."""
    weight = tensors.take(f"{name}.weight", None, inputs)
    return weight, tensors.take(f"{name}.bias", len(weight))


def _convolution(tensors: Tensors, name: str) -> tuple[Tensor, Tensor]:
    """Return the kernel and bias of a 3 × 3 torch.nn.Conv2d."""
    kernel = tensors.take(f"{MODULE}{name}.weight", None, None, 3, 3)
    return kernel, tensors.take(f"{MODULE}{name}.bias", len(kernel))


def _monotone(tensors: Tensors, n: int, m: float, scales: tuple[str, str]) -> Tensor:
    """Return the kernel of mI + gVᵀV − S + Sᵀ, 5 × 5."""
    V = tensors.take(MODULE + "A.weight", n, n, 3, 3)
    S = tensors.take(MODULE + "B.weight", n, n, 3, 3)
    g, h = (tensors.take(MODULE + name) for name in scales)
    for name, kernel in (("A", V), ("B", S)):
        if not kernel.any():
            raise ValueError(f"{MODULE}{name}.weight is zero, and the network divides by its norm")
    S = h * S / S.norm()
    kernel = g * _gram(mirror(V / V.norm())) + functional.pad(mirror(S) - S, [1] * 4)
    kernel[:, :, 2, 2] += m * torch.eye(n, dtype=kernel.dtype)
    return kernel


def _gram(kernel: Tensor) -> Tensor:
    """Return the kernel of UUᵀ for the convolution U."""
    return functional.conv2d(kernel, kernel, padding=kernel.shape[-1] - 1)


def _root(tensors: Tensors, name: str) -> Tensor:
    value = tensors.take(MODULE + name)
    if value < 0:
        raise ValueError(f"{MODULE}{name} is {float(value)}, and the network takes its root")
    return value.sqrt()


def _multiplier(tensors: Tensors, n: int) -> Tensor:
    """Return Λ = exp(−ψ) of every channel, or of every channel and pixel.

    Where ψ is one number (metric="identity"), the network has Λ = 1 whatever the number.
    """
    name = MODULE + "psi"
    shape = tensors.shape(name)
    psi = tensors.take(name, *shape)
    if shape == (1, 1, 1, 1):
        return psi.new_ones(n)
    if len(shape) == 4 and shape[0] == 1:
        psi = psi[0]
    if psi.ndim != 3 or len(psi) not in (1, n):
        raise ValueError(
            f"{name} must have shape 1 × channels × height × width, where channels are {n} or 1, "
            f"and height and width those of the image and its border or 1, got {shape}"
        )
    Lambda = torch.exp(-psi).expand(n, -1, -1)
    return Lambda.flatten() if Lambda.shape[1:] == (1, 1) else Lambda


def _dense(
    W: Tensor, U: Tensor, b: Tensor, C: Tensor, b_y: Tensor, Lambda: Tensor,
    gamma: float | None, task: ImageTask | None,
) -> EquilibriumClassifier:  # fmt: skip
    task = task_for(task, U.shape[1], len(C), MNIST, CIFAR10)
    weights = DenseWeights(W=W, U=U, b=b, C=C, D=None, b_y=b_y, Lambda=Lambda, gamma=gamma)
    return EquilibriumClassifier.from_weights(weights, task)


def _pooled(
    U: Tensor, b: Tensor, G: Tensor, b_y: Tensor, monotone: Tensor, Lambda: Tensor,
    gamma: float | None, pool: int | None, task: ImageTask | None,
) -> ConvolutionalEquilibriumClassifier | EquilibriumClassifier:  # fmt: skip
    """Return the classifier with W = I − Λ⁻¹(monotone + ½CᵀC/γ + ½ΛUUᵀΛ/γ)."""
    known = [t for t in (MNIST, CIFAR10) if t.shape[0] == U.shape[1]]
    sizes = [math.prod(t.shape) for t in ([task] if task else known)]
    task = task_for(task, sizes[0] if sizes else 0, len(G), *known)
    C = _pooling(G, len(b), task, pool)
    if Lambda.ndim == 3:
        return _per_pixel(U, b, C, b_y, monotone, Lambda, gamma, task)
    row = Lambda[:, None, None, None]
    kernel, A = monotone / row, torch.zeros_like(C)
    if gamma is not None:
        kernel = kernel + _gram(row * U) / (2 * gamma) / row
        A = -C / (2 * gamma * taps(Lambda))
    W = -kernel
    W[:, :, 2, 2] += torch.eye(len(b), dtype=W.dtype)
    state = _state(W, U, b, Lambda, task)
    weights = PooledWeights(state=state, A=A, C=C, b_y=b_y, gamma=gamma)
    return ConvolutionalEquilibriumClassifier.from_weights(weights, task)


def _per_pixel(
    U: Tensor, b: Tensor, C: Tensor, b_y: Tensor, monotone: Tensor, Lambda: Tensor,
    gamma: float | None, task: ImageTask,
) -> EquilibriumClassifier:  # fmt: skip
    """Return the classifier of `_pooled` with a multiplier per pixel: its W is no convolution."""
    wanted, units = tuple(size + 2 for size in task.shape[1:]), math.prod(C.shape[1:])
    if Lambda.shape[1:] != wanted:
        raise ValueError(
            f"{MODULE}psi is for images with their border of {tuple(Lambda.shape[1:])} pixels, and "
            f"these are {wanted}: give the images of the checkpoint, task=ImageTask(…)"
        )
    if units > _MOST_UNITS:
        raise ValueError(
            f"{MODULE}psi is a multiplier per pixel (metric='full' or 'image'). Then W is no "
            f"convolution, and as a matrix it has {units} × {units} entries; up to {_MOST_UNITS} "
            "units are read. Networks with metric='channels' or 'identity' are read at any size"
        )
    image = (task.shape[1], task.shape[2])
    plain = _state(monotone, U, b, torch.ones_like(b), task).dense(image)
    multiplier, C = Lambda[:, 1:-1, 1:-1].flatten(), C.flatten(1)
    inner = plain.W
    if gamma is not None:
        products = _state(_gram(U), U, b, torch.ones_like(b), task).dense(image).W
        inner = inner + C.T @ C / (2 * gamma)
        inner = inner + multiplier[:, None] * products * multiplier / (2 * gamma)
    W = torch.eye(units, dtype=inner.dtype) - inner / multiplier[:, None]
    return _dense(W, plain.U, plain.b, C, b_y, multiplier, gamma, task)


def _state(
    W: Tensor, U: Tensor, b: Tensor, Lambda: Tensor, task: ImageTask
) -> ConvolutionalWeights:
    """Return the weights of a state without outputs, on images surrounded by zeros."""
    geometry = ImageGeometry(
        task.shape[1:], circular=False, state_channels=len(b), state_kernel=5, input_kernel=3
    )
    return ConvolutionalWeights(
        W=W, U=U, b=b, C=W.new_zeros(0, len(b), 1, 1), D=None, b_y=b.new_zeros(0), Lambda=Lambda,
        gamma=None, circular=False, geometry=geometry,
    )  # fmt: skip


def _pooling(G: Tensor, channels: int, task: ImageTask, pool: int | None) -> Tensor:
    """Return C: the matrix G after averages over windows that start at the border."""
    height, width = (size + 2 for size in task.shape[1:])
    cells = G.shape[1] / channels
    fits = [p for p in range(1, height + 1) if (height // p) * (width // p) == cells]
    if pool not in (None, *fits) or not fits or (pool is None and len(fits) > 1):
        raise ValueError(
            f"Wout reads {G.shape[1]} numbers of {channels} channels. Images of {height} × {width} "
            f"pixels with their border have so many for windows of the sizes {fits}: give pool=… "
            f"of these, or the images of the checkpoint, task=ImageTask(…); got pool={pool}"
        )
    pool = fits[0] if pool is None else pool
    rows, columns = height // pool, width // pool
    C = G.unflatten(1, (channels, rows, columns)) / pool**2
    C = C.repeat_interleave(pool, 2).repeat_interleave(pool, 3)
    C = functional.pad(C, (0, width - columns * pool, 0, height - rows * pool))
    return C[:, :, 1:-1, 1:-1].contiguous()
