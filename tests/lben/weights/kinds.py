"""Weights of every kind with their inputs and states, and what they do in rational arithmetic."""

import dataclasses
from fractions import Fraction

import torch

from lben import EquilibriumConv2d, EquilibriumLinear, PooledEquilibriumConv2d
from lben.weights import ConvolutionalWeights, DenseWeights, ImageGeometry, PooledWeights

F64 = torch.float64


def own(layer):
    """The weights of a layer, away from where they start and cut from the graph."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
        return layer.weights().apply(torch.Tensor.detach)


def images(*sizes, image=(4, 5), **options):
    return own(EquilibriumConv2d(*sizes, image=image, dtype=F64, **options))


def with_kernel(size=(3, 3), **options):
    """A read-out with a kernel D, which no layer of lben has with a state."""
    w = images(2, 3, 2, **options)
    return dataclasses.replace(w, D=torch.randn(2, 2, *size, dtype=F64), gamma=None)


def without_state(circular=False):
    """W = 0, kernels of even size."""
    geometry = ImageGeometry(
        (4, 5), circular=circular, state_channels=3, state_kernel=1, input_kernel=3
    )
    g = torch.Generator().manual_seed(0)
    return ConvolutionalWeights(
        U=torch.randn(3, 2, 3, 3, generator=g, dtype=F64),
        b=torch.randn(3, generator=g, dtype=F64),
        C=torch.randn(2, 3, 3, 3, generator=g, dtype=F64), D=1.0,
        b_y=torch.randn(2, generator=g, dtype=F64),
        Lambda=0.5 + torch.rand(3, generator=g, dtype=F64), gamma=None, circular=circular,
        geometry=geometry,
    )  # fmt: skip


def pooled(channels=3, **options):
    return own(PooledEquilibriumConv2d(2, channels, 3, image=(6, 8), pool=2, dtype=F64, **options))


KINDS = {
    "dense": lambda: own(EquilibriumLinear(5, 6, 3, feedthrough=True, dtype=F64)),
    "dense without D": lambda: own(EquilibriumLinear(5, 6, 3, dtype=F64)),
    "kernel D": with_kernel,
    "kernel D, circular": lambda: with_kernel(circular=True, image=(5, 5)),
    "oblong D, circular": lambda: with_kernel((4, 3), circular=True, image=(5, 5)),
    "number D": lambda: images(2, 3, 2, skip=0.3),
    "no D": lambda: images(2, 3, 2),
    "stride": lambda: images(2, 3, 2, 1, image=(4, 6), stride=2),
    "reads the state": lambda: images(2, 3),
    "reads the state, number D": lambda: dataclasses.replace(images(2, 2), D=0.7, gamma=None),
    "without a state": without_state,
    "pooled": pooled,
    "pooled, circular": lambda: pooled(circular=True, kernel_size=1),
    "pooled, two scales": lambda: pooled((2, 3)),
}


def placed(w):
    """The geometry of weights of images; None of features."""
    if isinstance(w, DenseWeights):
        return None
    return w.state.placed if isinstance(w, PooledWeights) else w.placed


def matrices(w):
    """The same weights as matrices."""
    if isinstance(w, DenseWeights):
        return w
    return w.dense() if isinstance(w, PooledWeights) else w.dense(w.placed.grid)


def draw(w, scale=1.0):
    """Inputs and states: ordinary ones, cancelling ones, of many sizes, and next to nothing."""

    def numbers(*shape):
        g = torch.Generator().manual_seed(1)
        x = torch.randn(4, *shape, generator=g, dtype=F64)
        x[1] += 2.0**20 * (-1.0) ** torch.arange(x[1].numel(), dtype=F64).view(shape)
        x[2] *= 2.0 ** torch.linspace(-30, 10, x[2].numel(), dtype=F64).view(shape)
        x[3] *= torch.finfo(F64).tiny
        return scale * x

    geometry = placed(w)
    if geometry is None:
        return numbers(w.in_features), numbers(w.hidden_features)
    z = numbers(len(w.multiplier), *geometry.grid)
    return numbers(*w.sample_shape), geometry.embed(z)


def crop(w, z):
    """States as vectors of what lies inside the image."""
    geometry = placed(w)
    return z if geometry is None else geometry.crop(z).flatten(1)


def flat_inputs(w, x):
    geometry = placed(w)
    return x if geometry is None else geometry.downsample(x).flatten(1)


def rational(t):
    return [[Fraction(v) for v in row] for row in t.flatten(1).tolist()]


def exact_products(w, x, z):
    """v and y of every sample as fractions, by the matrices of the weights."""
    m = matrices(w)
    U, C = rational(m.U), rational(m.C)
    D = None if m.D is None else rational(m.D)
    b, b_y = rational(m.b[None])[0], rational(m.b_y[None])[0]

    def affine(A, vector, start):
        return [
            s + sum(a * c for a, c in zip(row, vector, strict=True) if a)
            for row, s in zip(A, start, strict=True)
        ]

    drives, outputs = [], []
    for u, state in zip(rational(flat_inputs(w, x)), rational(crop(w, z)), strict=True):
        drives.append(affine(U, u, b))
        y = affine(C, state, b_y)
        outputs.append(y if D is None else affine(D, u, y))
    return drives, outputs
