"""Which chain of 1-Lipschitz layers does a checkpoint hold? SLL, LBDN, 1LipschitzLayersCompared.

Where a project divides by T ⪰ UUᵀ, the layers here have its free tensors and compute T anew,
rounded up: their outputs are those of the project up to a few millionths, and the bound is proved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lben.certificates import LipschitzCertificate
from lben.interop.checkpoints.files import Tensors
from lben.interop.checkpoints.tasks import task_for
from lben.layers import (
    ChannelPadding,
    EquilibriumConv2d,
    EquilibriumLinear,
    Flatten,
    GroupSort,
    InvertibleDownsampling,
    LipschitzSequential,
    NormalizedLinear,
)
from lben.layers.feedforward import ContractionLayer, FeedforwardLayer, ResidualLayer
from lben.layers.fingerprint import fingerprint
from lben.layers.fixed import FixedImageMap, FixedMap
from lben.models import Classifier, FeedforwardClassifier, FeedforwardClassifierConfig, ImageTask
from lben.parameterizations import (
    ContractionParameterization,
    Gershgorin,
    ResidualParameterization,
)
from lben.parameterizations.feedforward import UNIT_BOUND
from lben.weights import ConvolutionalWeights, DenseWeights
from lben.weights.image import ImageGeometry
from lben.weights.linear_maps import Convolution, mirror, taps


def _shifted(shape: tuple[int, int, int], classes: int, *mean: float) -> ImageTask:
    return ImageTask(shape=shape, classes=classes, mean=mean, std=(1.0,) * len(mean))


SLL_TASKS = (
    _shifted((3, 32, 32), 10, 0.4913, 0.4821, 0.4465),
    _shifted((3, 32, 32), 100, 0.5071, 0.4865, 0.4409),
    _shifted((3, 64, 64), 200, 0.485, 0.456, 0.406),
)
COMPARED_TASKS = (
    _shifted((3, 32, 32), 10, 0.49139968, 0.48215841, 0.44653091),
    _shifted((3, 64, 64), 200, 0.485, 0.456, 0.406),
)
"""CIFAR-10 and TinyImageNet. How many outputs are classes is not in the file."""
LBDN_TASKS = {
    10: _shifted((3, 32, 32), 10, 0.4914, 0.4822, 0.4465),
    100: _shifted((3, 32, 32), 100, 0.5071, 0.4865, 0.4409),
    200: _shifted((3, 64, 64), 200, 0.485, 0.456, 0.406),
}
"""By classes, of networks with convolutions."""


class ChainClassifier(Classifier):
    """Normalisation, and a chain of layers of a project.

    Args:
        task: shape, classes and normalisation of the images.
        layers: the chain, flattening included.
        head: the last layer, if it bounds every pair of logits; None otherwise.
        gamma: the bound that the project promises on the normalised image.
    """

    def __init__(
        self,
        task: ImageTask,
        layers: Sequence[nn.Module],
        head: NormalizedLinear | None,
        gamma: float,
    ) -> None:
        super().__init__(task.shape, task.mean, task.std)
        self.config, self._gamma = task, gamma
        self.features, self.head = LipschitzSequential(*layers), head

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        ends = () if self.head is None else (self.head,)
        return self.normalize, self.features, *ends

    @property
    def gamma(self) -> float | None:
        return self._gamma


def _certificate(module: FixedMap) -> LipschitzCertificate:
    return LipschitzCertificate(
        bound=1.0, margin=None, fingerprint=fingerprint(module), dtype="any",
        method=f"{type(module).__name__} is 1-Lipschitz, whatever its parameters",
    )  # fmt: skip


class FirstChannels(FixedImageMap):
    """Keep the first channels: an orthogonal projection.

    Args:
        channels: to keep.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Float[Tensor, "*batch p h w"]) -> Float[Tensor, "*batch q h w"]:
        """Return the first channels."""
        return x[..., : self.channels, :, :]

    def certificate(self, image: tuple[int, ...] | None = None) -> LipschitzCertificate:
        """Return the certificate of the bound 1."""
        return _certificate(self)

    def extra_repr(self) -> str:
        """Describe the map in `repr`."""
        return str(self.channels)


class MaxMin(GroupSort):
    """Sort pairs of channels, the larger first: a permutation that depends on x."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Float[Tensor, "batch c *grid"]) -> Float[Tensor, "batch c *grid"]:
        """Return x with its pairs sorted."""
        return super().forward(x).unflatten(1, (-1, 2)).flip(2).flatten(1, 2)

    def certificate(self, image: tuple[int, ...] | None = None) -> LipschitzCertificate:
        """Return the certificate of the bound 1."""
        return _certificate(self)


_EPSILON = 1e-6
"""What 1LipschitzLayersCompared adds to |q| and to T."""


class _Raised(Gershgorin):
    """T of `Gershgorin`, and 10⁻⁶ more."""

    def multiplier(self, U: Tensor) -> Tensor:
        return (super().multiplier(U) + _EPSILON) * (1 + 2 * torch.finfo(U.dtype).eps)


@torch.no_grad()
def read_sll(tensors: Tensors, *, task: ImageTask | None = None) -> FeedforwardClassifier:
    """Return SLL: residual layers with T of Gershgorin, pooling, normalised rows.

    y = x − 2UᵀT⁻¹σ(Ux + b) with Tᵢ = Σⱼ |UUᵀ|ᵢⱼ exp(qⱼ − qᵢ). Araujo et al. (2023).
    """
    indices = tensors.indices()
    convolutions = [i for i in indices if f"{i}.kernel" in tensors]
    dense = [i for i in indices if f"{i}.q" in tensors and i not in convolutions]
    if not convolutions:
        raise ValueError("a checkpoint of SLL has convolutions (kernel, bias, q), got none")
    inner, channels, *_ = shape = _kernel_shape(tensors, f"{convolutions[0]}.kernel", 3)
    head = f"{indices[-1]}.weight"
    classes, features = tensors.shape(head, 2)
    units = tensors.shape(f"{dense[0]}.q", 1)[0] if dense else features
    side = 4 * math.isqrt(features // channels)
    task = task_for(task, 3 * side * side, classes, *SLL_TASKS)
    config = FeedforwardClassifierConfig(
        block="sll", stem=1, channels=(channels,), depths=(len(convolutions),), kernel_size=3,
        conv_hidden=inner, pool=4, dense_depth=len(dense), dense_hidden=units, head="rows",
        shape=task.shape, classes=task.classes, mean=task.mean, std=task.std,
    )  # fmt: skip
    model = FeedforwardClassifier(config).double()
    layers = [m for m in model.features if isinstance(m, FeedforwardLayer)]
    for i, layer in zip((*convolutions, *dense), layers, strict=True):
        if i in convolutions:
            U, b = tensors.take(f"{i}.kernel", *shape), tensors.take(f"{i}.bias", 1, inner, 1, 1)
        else:
            U = tensors.take(f"{i}.weight", units, features)
            b = tensors.take(f"{i}.bias", 1, units)
        _fill(layer.parameterization, U=U, b=b.flatten())
        _fill(_rule(layer), log_q=tensors.take(f"{i}.q", len(U)))
    _fill(model.head, weight=tensors.take(head, classes, features),
          bias=tensors.take(f"{indices[-1]}.bias", classes))  # fmt: skip
    tensors.finish()
    return model


@torch.no_grad()
def read_compared(tensors: Tensors, *, task: ImageTask | None = None) -> ChainClassifier:
    """Return a network of 1LipschitzLayersCompared whose layers are AOL or SLL.

    A 1 × 1 layer; blocks of layers with MaxMin after each, the first half of the channels and
    pixels moved into channels; a 1 × 1 layer; the first outputs as logits.
    """
    first = "FirstConv."
    name = first + ("kernel" if first + "q" in tensors else "parametrizations.weight.original")
    if name not in tensors:
        raise ValueError(
            "of the layers of 1LipschitzLayersCompared, AOLConv2d and SLLConv2d are read. The "
            "multipliers of CPL come from a power iteration, and BCOP, Cayley, LOT, SOC, ECO and "
            "sandwich are orthogonal maps of other kinds: trace the network with its own project"
        )
    width = tensors.shape(name, 4)[0]
    layers: list[nn.Module] = [ChannelPadding(width), _compared(tensors, first, width, 1), MaxMin()]
    blocks = 0
    while f"Block{blocks + 1}.0.bias" in tensors:
        blocks, j = blocks + 1, 0
        while f"Block{blocks}.{j}.bias" in tensors:
            layers += [_compared(tensors, f"Block{blocks}.{j}.", width, None), MaxMin()]
            j += 2
        layers += [FirstChannels(width // 2), InvertibleDownsampling(2)]
        width *= 2
    layers += [_compared(tensors, "ClassificationHead.0.", width, 1), Flatten()]
    tensors.finish()
    side = 2**blocks
    known = {math.prod(t.shape): t for t in COMPARED_TASKS}
    if task is None and 3 * side * side in known:
        task = known[3 * side * side]
    if task is None or task.shape[1:] != (side, side) or task.classes > width:
        raise ValueError(
            f"{blocks} blocks and {width} outputs are for images of {side} × {side} pixels and at "
            f"most {width} classes: give them, task=ImageTask(…); got {task}"
        )
    head = NormalizedLinear(width, task.classes)
    _fill(head, weight=torch.eye(task.classes, width), bias=torch.zeros(task.classes))
    return ChainClassifier(task, layers, head, 1.0).double()


@torch.no_grad()
def read_lbdn(
    tensors: Tensors, *, gamma: float | None = None, task: ImageTask | None = None
) -> LipschitzSequential | ChainClassifier:
    """Return LBDN: y = √2AᵀΨσ(√2Ψ⁻¹Bx + b) with [A B] orthonormal, layer after layer.

    [A B] is the Cayley transform of αV/‖V‖, of convolutions at every frequency. The input of the
    first and of the last layer is scaled by √γ. The last one is Bx + b, or has normalised rows.
    Wang and Manchester (2023).
    """
    if gamma is None or not 0 < gamma < math.inf:
        raise ValueError(
            "the input of the first and last layer of LBDN is multiplied by √γ, and γ is not in "
            f"the file: give it, gamma=…, a positive number; got {gamma}"
        )
    indices = tensors.indices()
    hidden = [i for i in indices if f"{i}.psi" in tensors]
    if not hidden or len(indices) != len(hidden) + 1:
        raise ValueError(
            f"a checkpoint of LBDN has sandwich layers (psi) and one last layer, got {len(hidden)} "
            f"and {len(indices) - len(hidden)}"
        )
    kernels = [i for i in hidden if len(tensors.shape(f"{i}.weight")) == 4]
    dense = [i for i in hidden if i not in kernels]
    if not dense or (kernels and max(kernels) > min(dense)):
        raise ValueError("a checkpoint of LBDN has convolutions before dense layers, got others")
    last, root = indices[-1], math.sqrt(gamma)
    rows_only = f"{last}.alpha" not in tensors
    scale = dict.fromkeys(hidden, 1.0)
    scale[hidden[0]] *= root
    scale[hidden[-1]] *= root if rows_only else 1.0
    layers: list[nn.Module] = []
    if kernels:
        classes = tensors.shape(f"{last}.weight", 2)[0]
        task = LBDN_TASKS.get(classes) if task is None else task
        layers = _convolutions(tensors, {i: scale[i] for i in kernels}, task)
    weights: list[DenseWeights] = []
    for i in dense:
        inputs = weights[-1].out_features if weights else None
        weights.append(_sandwich(tensors, f"{i}.", scale[i], inputs))
    features = weights[-1].out_features
    head = None
    if rows_only:
        Q = tensors.take(f"{last}.weight", None, features)
        head = NormalizedLinear(features, len(Q), dtype=torch.float64)
        _fill(head, weight=Q, bias=tensors.take(f"{last}.bias", len(Q)))
    else:
        weights[-1] = _read_out(tensors, f"{last}.", weights[-1], root)
    tensors.finish()
    layers += [] if task is None else [Flatten()]
    layers += [EquilibriumLinear.from_weights(w) for w in weights]
    if task is None:
        return LipschitzSequential(*layers, *([] if head is None else [head]))
    outputs = weights[-1].out_features if head is None else head.out_features
    if kernels:
        flat = LipschitzSequential(*layers[: len(layers) - len(weights)])
        found = flat(torch.zeros(1, *task.shape, dtype=torch.float64)).shape[1]
        if found != weights[0].in_features:
            raise ValueError(
                f"the convolutions have {found} outputs for images of shape {task.shape}, and "
                f"{dense[0]}.weight has {weights[0].in_features} inputs: give the images of the "
                "checkpoint, task=ImageTask(…)"
            )
    task_for(task, math.prod(task.shape) if kernels else weights[0].in_features, outputs)
    return ChainClassifier(task, layers, head, gamma).double()


def _convolutions(
    tensors: Tensors, scales: dict[int, float], task: ImageTask | None
) -> list[nn.Module]:
    """Return sandwich layers of images on a torus; a layer of stride 2 moves pixels into channels.

    Args:
        tensors: of the checkpoint.
        scales: of the input, by layer.
        task: the images.
    """
    if task is None or task.shape[1] != task.shape[2]:
        raise ValueError(
            "the convolutions of LBDN are made for one image size, and the outputs are not those "
            "of CIFAR-10, CIFAR-100 or TinyImageNet: give square images, task=ImageTask(…); got "
            f"{task}"
        )
    channels, side, _ = task.shape
    layers: list[nn.Module] = []
    for i, scale in scales.items():
        outputs, both, *_ = tensors.shape(f"{i}.weight")
        if both - outputs == 4 * channels:
            layers.append(InvertibleDownsampling(2))
            channels, side = 4 * channels, side // 2
        if both - outputs != channels:
            raise ValueError(
                f"{i}.weight is for an input of {both - outputs} channels, and its input has "
                f"{channels}, or {4 * channels} with stride 2: give the images, task=ImageTask(…)"
            )
        layers.append(_sandwich_of_images(tensors, f"{i}.", scale, channels, side))
        channels = outputs
    return layers


def _sandwich_of_images(
    tensors: Tensors, prefix: str, scale: float, channels: int, side: int
) -> EquilibriumConv2d:
    """Return a sandwich layer of images whose kernels are as large as the image."""
    q, both, k, _ = tensors.shape(prefix + "weight")
    kernel = tensors.take(prefix + "weight", q, q + channels, k, k)
    if k > side:
        raise ValueError(f"{prefix}weight is larger than images of {side} × {side} pixels")
    psi, b = tensors.take(prefix + "psi", q), tensors.take(prefix + "bias", q)
    # Σ V[t] exp(2πi ω·(t − s)/side) at every frequency ω, where s is the middle of the kernel.
    padded = functional.pad(kernel, (0, side - k, 0, side - k))
    middle = (k - 1) // 2
    symbol = torch.fft.fft2(padded.roll((-middle, -middle), (2, 3))).conj()
    half = symbol[..., : side // 2 + 1]
    symbol = tensors.take(prefix + "alpha") * symbol / torch.linalg.vector_norm(half)
    Q = orthonormal_rows(symbol.permute(2, 3, 0, 1)).permute(2, 3, 0, 1)
    anchor = side // 2
    kernels = torch.fft.fft2(Q).real / side**2  # d ↦ the number that multiplies x[s + d]
    A, B = kernels.roll((anchor, anchor), (2, 3)).split([q, both - q], dim=1)
    Psi = psi.exp()
    geometry = ImageGeometry(
        (side, side), circular=True, state_channels=q, state_kernel=1, input_kernel=side
    )
    weights = ConvolutionalWeights(
        U=math.sqrt(2) * scale * B / Psi[:, None, None, None], b=b,
        C=math.sqrt(2) * mirror(A) * taps(Psi), D=None, b_y=torch.zeros_like(b),
        Lambda=Psi**2 / scale, gamma=scale * UNIT_BOUND, circular=True, geometry=geometry,
    )  # fmt: skip
    return EquilibriumConv2d.from_weights(weights)


def orthonormal_rows(V: Tensor) -> Tensor:
    """Return the Cayley transform of a wide matrix: a matrix with orthonormal rows.

    Args:
        V: … × q × p with p > q, real or complex.

    Returns:
        … × q × p.
    """
    q = V.shape[-2]
    top, rest = V[..., :q].mT, V[..., q:].mT
    skew = top - top.mH + rest.mH @ rest
    identity = torch.eye(q, dtype=V.dtype)
    inverse = torch.linalg.inv(identity + skew)
    return torch.cat([inverse @ (identity - skew), -2 * rest @ inverse], -2).mT


def _kernel_shape(tensors: Tensors, name: str, size: int) -> tuple[int, int, int, int]:
    shape = tensors.shape(name)
    if len(shape) != 4 or shape[2:] != (size, size):
        raise ValueError(f"{name} must have shape any × any × {size} × {size}, got {shape}")
    return shape[0], shape[1], size, size


def _fill(module: nn.Module, **values: Tensor) -> None:
    """Copy values into parameters."""
    for name, value in values.items():
        parameter = getattr(module, name)
        parameter.copy_(value)


def _compared(tensors: Tensors, prefix: str, width: int, size: int | None) -> FeedforwardLayer:
    """Return a layer of 1LipschitzLayersCompared with as many outputs as inputs."""
    if prefix + "kernel" in tensors:
        U = tensors.take(prefix + "kernel", width, width, size, size)
        rule = _Raised(width, dtype=U.dtype)
        _fill(rule, log_q=(tensors.take(prefix + "q", width).abs() + _EPSILON).log())
        residual = ResidualParameterization(tuple(U.shape), rule, dtype=U.dtype)
        _fill(residual, U=U, b=tensors.take(prefix + "bias", width))
        return ResidualLayer(residual, _same(U, circular=False))
    V = tensors.take(prefix + "parametrizations.weight.original", width, width, size, size)
    rule = _Raised(width, learn_q=False, dtype=V.dtype)
    contraction = ContractionParameterization(tuple(V.shape), rule, dtype=V.dtype)
    _fill(contraction, V=V, b_y=tensors.take(prefix + "bias", width))
    return ContractionLayer(contraction, _same(V, circular=True))


def _same(kernel: Tensor, *, circular: bool) -> Convolution:
    height, size = kernel.shape[-2:]
    if height != size or size % 2 == 0:
        raise ValueError(f"kernels must be square and odd, got {height} × {size}")
    return Convolution(kernel_size=size, padding=size // 2, circular=circular, stride=1)


def _rule(layer: FeedforwardLayer) -> Gershgorin:
    rule = layer.parameterization.rule
    assert isinstance(rule, Gershgorin)
    return rule


def _sandwich(tensors: Tensors, prefix: str, scale: float, inputs: int | None) -> DenseWeights:
    """Return the weights of a sandwich layer whose input is multiplied by `scale`."""
    A, B = _orthonormal(tensors, prefix, inputs)
    psi, b = tensors.take(prefix + "psi", len(A)), tensors.take(prefix + "bias", len(A))
    Psi = psi.exp()
    return DenseWeights(
        W=torch.zeros_like(A), U=math.sqrt(2) * scale * B / Psi[:, None], b=b,
        C=math.sqrt(2) * A.T * Psi, D=None, b_y=torch.zeros_like(b), Lambda=Psi**2 / scale,
        gamma=scale * UNIT_BOUND,
    )  # fmt: skip


def _read_out(tensors: Tensors, prefix: str, w: DenseWeights, scale: float) -> DenseWeights:
    """Return a layer's weights with the last map of LBDN, y ↦ scale·By + b, after it."""
    _, B = _orthonormal(tensors, prefix, w.out_features)
    assert w.gamma is not None
    return DenseWeights(
        W=w.W, U=w.U, b=w.b, C=scale * B @ w.C, D=None,
        b_y=tensors.take(prefix + "bias", len(B)), Lambda=scale * w.Lambda, gamma=scale * w.gamma,
    )  # fmt: skip


def _orthonormal(tensors: Tensors, prefix: str, inputs: int | None = None) -> tuple[Tensor, Tensor]:
    """Return A, q × q, and B, q × p, with AAᵀ + BBᵀ = I."""
    q = tensors.shape(prefix + "weight", 2)[0]
    V = tensors.take(prefix + "weight", q, None if inputs is None else q + inputs)
    V = tensors.take(prefix + "alpha") * V / V.norm()
    if V.shape[1] <= q:
        raise ValueError(f"{prefix}weight has {V.shape[1]} columns for {q} outputs: no inputs")
    A, B = orthonormal_rows(V).split([q, V.shape[1] - q], dim=1)
    return A, B
