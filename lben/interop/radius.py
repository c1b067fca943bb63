"""Within which radius can no label change, whatever the model is? One function asks every proof.

Note [Ladder]
From cheap to expensive: the margin over a global bound; linear relaxations around each input, by
back-substitution; ascent, and branch and bound. The radius is the largest that any rung proves.

Note [Exact network]
All radii are of the exact network: in real arithmetic, with the numbers that are stored in float32
or float64. Where weights are computed from parameters (`SLLLinear`, for example) they are the
numbers that this computation returns in the precision of the model.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Self, cast

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from lben.certificates import ChainCertificate, LipschitzCertificate
from lben.certificates.relaxation import InputNorm, InputRegion
from lben.interop.converted import ConvertedNetwork
from lben.interop.maps import ConversionError
from lben.interop.pytorch import from_torch
from lben.layers import BoundedModule, EquilibriumLinear
from lben.models import Bound, Classifier, EquilibriumClassifier
from lben.radii.margin import margin_radius
from lben.radii.relaxation import certify_balls, find_ball_radii
from lben.rigorous import up
from lben.tightening.routes import Route, prove_by_route
from lben.weights.activation import RELU, TANH, Activation, make_leaky_relu
from lben.weights.affine_system import AffineSystem
from lben.weights.network import Network
from solvers import LeakyReLU, ProximalActivation, ReLU, Tanh

if TYPE_CHECKING:
    from lben.progress import Progress

Model = nn.Module | Network
"""What can be certified: a module of PyTorch or of this package, or a network of blocks."""

_BOUNDS: tuple[Bound, ...] = ("diagonal", "scaled", "promised")
"""Of a classifier: the first that it has is proved. Those of pairs cost more."""
_BATCH = 16
"""Inputs between two updates of the progress bar."""
_TRIALS = 12
"""About so many radii are tried for an input: each gets this part of its seconds."""
_LEAST_SECONDS = 60.0
"""That the route to a global bound may need."""
_DOWN = 1 - 2.0**-48
"""More than what a quotient is rounded up by."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RadiusCertifier:
    """What proves radii of one model: its global bound, and its equations for local proofs.

    Attributes:
        module: a copy of the model on the CPU, or the converted network.
        certificate: of its global bound.
        route: how the bound was found, for a network that has no bound of its own.
        system: the equations for proofs around single inputs; None where there are none: images
            with convolutional equilibria, and modules that `from_torch` does not convert.

    Example:
        >>> import torch
        >>> from lben.interop import RadiusCertifier
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        ... ).eval()
        >>> certifier, x = RadiusCertifier.of(model, (4,)), torch.rand(2, 4)
        >>> labels, region = model(x).argmax(1), {"norm": "l2", "box": None}
        >>> radius = certifier.prove_globally(x, labels, "l2")
        >>> certifier.prove_locally(x, labels, radius, seconds=0.0, **region).tolist()
        [True, True]
    """

    module: BoundedModule
    certificate: LipschitzCertificate
    route: Route | None
    system: AffineSystem | None

    @classmethod
    def of(
        cls,
        model: Model,
        shape: tuple[int, ...],
        certificate: LipschitzCertificate | None = None,
        *,
        seconds: float = 600.0,
    ) -> Self:
        """Prove the global bound of a model and find its equations.

        Args:
            model: in eval mode; as for `certified_radius`.
            shape: of one input, without the batch.
            certificate: of a module that has a bound of its own, to save its proof.
            seconds: that the route to a global bound may need, see `prove_by_route`.

        Raises:
            TypeError: if the model is neither a module nor a network.
            ValueError: if the shape does not fit, or a certificate is given for a model that has no
                bound of its own (`ConversionError` if it cannot be converted).
            CertificateError: if no bound is proved.
        """
        route = None
        if not isinstance(model, nn.Module | Network):
            raise TypeError(
                f"model must be a torch.nn.Module or a Network, got {type(model).__name__}: read a "
                "file by from_onnx or load_checkpoint first"
            )
        if not isinstance(model, BoundedModule):
            if certificate is not None:
                raise ValueError(
                    f"{type(model).__name__} has no bound of its own that a certificate could "
                    "prove: certify ConvertedNetwork(from_torch(model, shape))"
                )
            network = model if isinstance(model, Network) else from_torch(model, shape)
            _check_shape(network, shape)
            certificate, route = prove_by_route(network, seconds=seconds)
            model = ConvertedNetwork(network)
        elif isinstance(model, ConvertedNetwork):
            _check_shape(model.network, shape)
        elif isinstance(model, Classifier):
            model = model.freeze()
        else:
            model = copy.deepcopy(cast(nn.Module, model)).cpu().eval().requires_grad_(False)
        module = cast(BoundedModule, model)
        return cls(
            module=module, certificate=certificate or _prove_own_bound(module, shape), route=route,
            system=_find_system(model, shape),
        )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the module runs in; float64 for a converted network."""
        module = cast(nn.Module, self.module)
        tensors = chain(module.parameters(), module.buffers())
        return next((t.dtype for t in tensors if t.is_floating_point()), torch.float64)

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "batch ..."]) -> Integer[Tensor, " batch"]:
        """Return the label that the module gives each input.

        Args:
            x: inputs, float32 or float64.
        """
        y: Tensor = cast(nn.Module, self.module)(x.detach().cpu().to(self.dtype))
        return y.argmax(1)

    def prove_globally(
        self, x: Float[Tensor, "batch ..."], labels: Integer[Tensor, " batch"], norm: InputNorm
    ) -> Float[Tensor, " batch"]:
        """Return the radii that the margin and the global bound prove; 0 where misclassified.

        Args:
            x: inputs, float32 or float64.
            labels: one integer per input.
            norm: of the radii: in linf, that of l2 divided by √p for p numbers in an input.

        Returns:
            One radius ≥ 0 per input, float64, on the CPU.

        Raises:
            ValueError: if shapes or labels do not fit.
        """
        proof, dtype = self.certificate, self.dtype
        bound = proof.radius_bound() if isinstance(proof, ChainCertificate) else proof.bound
        radii = []
        for part in torch.arange(len(x), device="cpu").split(_BATCH):
            own = x[part].detach().cpu()
            run = own.to(dtype)
            moved = torch.linalg.vector_norm((own.double() - run.double()).flatten(1), dim=1)
            found = self.module.forward_with_error(run, self.certificate, moved * (1 + 2.0**-40))
            correct = labels[part].cpu()
            radii.append(margin_radius(found.value, correct, bound, logit_error=found.error).cpu())
        radius = torch.cat(radii)
        if norm == "linf":  # ‖Δ‖₂ ≤ √p ‖Δ‖_∞
            radius = radius / up(math.sqrt(x[:1].numel())) * _DOWN
        return radius

    def prove_locally(
        self,
        x: Float[Tensor, "batch ..."],
        labels: Integer[Tensor, " batch"],
        radius: float | Float[Tensor, " batch"],
        *,
        norm: InputNorm,
        box: tuple[float, float] | None,
        seconds: float,
    ) -> Bool[Tensor, " batch"]:
        """Say for which inputs a proof around them is found; for none where there is no system.

        Args:
            x, labels, radius, norm, box, seconds: as for `certify_balls`.

        Returns:
            One truth value per input, on the CPU.

        Raises:
            ValueError: if shapes, labels, radius, norm or box do not fit.
        """
        if self.system is None:
            return torch.zeros(len(x), dtype=torch.bool, device="cpu")
        found = certify_balls(
            self.system, x, labels.cpu(), radius, norm=norm, box=box, seconds=seconds
        )
        return torch.tensor([proof is not None for proof in found], dtype=torch.bool, device="cpu")


def certified_radius(
    model: Model,
    x: Float[Tensor, "batch ..."],
    labels: Integer[Tensor, " batch"],
    *,
    norm: InputNorm = "l2",
    box: tuple[float, float] | None = None,
    seconds: float = 1.0,
    local: bool = True,
    certificate: LipschitzCertificate | None = None,
    progress: bool = False,
) -> Float[Tensor, " batch"]:
    """Return a radius around each input within which the model's label is proved.

    The rungs of Note [Ladder] are climbed for every input, and the largest proved radius counts.
    It is of the exact network, see Note [Exact network].

    Args:
        model: a classifier, layer or chain of this package; any torch.nn.Module that `from_torch`
            converts; a `ConvertedNetwork` or a `Network`. In eval mode.
        x: inputs as the model takes them, float32 or float64.
        labels: one integer per input, in [0, classes).
        norm: "l2", or "linf" for the largest change of a number.
        box: smallest and largest value that a number of an input can have, such as (0, 1) for
            pixels. The statement is then about such inputs alone, and larger radii are proved.
            Without it, inputs may be any numbers.
        seconds: about how long is searched around each input beyond back-substitution; 0 for no
            search. The route to a global bound may need as long as all inputs together, or a
            minute.
        local: False for the margin over the global bound alone.
        certificate: of the model's bound, to save its proof: where the model is a classifier,
            layer, chain or `ConvertedNetwork`.
        progress: show a bar with the time left (needs tqdm).

    Returns:
        One radius ≥ 0 per input, float64, in the unit of x, on the device of x; 0 where the model
        gives another label.

    Raises:
        ValueError: if shapes, labels, norm or box do not fit, or an input is not finite.
        ConversionError: naming what cannot be converted.
        TypeError: if the model is no module and no network.
        CertificateError: if no bound is proved, or the certificate is of something else.

    Example:
        >>> import torch
        >>> from lben import certified_radius
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        ... ).eval()
        >>> x = torch.rand(3, 1, 4, 4)
        >>> labels = model(x).argmax(1)
        >>> labels[2] = (labels[2] + 1) % 3
        >>> radii = certified_radius(model, x, labels, seconds=0)
        >>> (radii > 0).tolist()
        [True, True, False]
        >>> among_pixels = certified_radius(model, x, labels, norm="linf", box=(0, 1), seconds=0)
        >>> bool((among_pixels <= radii).all())
        True
    """
    check_request(x, labels, norm, box, seconds)
    if not len(x):
        return torch.zeros(0, dtype=torch.float64, device=x.device)
    budget = max(_LEAST_SECONDS, seconds * len(x))
    certifier = RadiusCertifier.of(model, tuple(x.shape[1:]), certificate, seconds=budget)
    radii = certifier.prove_globally(x, labels, norm)
    if local and certifier.system is not None:
        with _bar(len(x), progress) as bar:
            for part in torch.arange(len(x), device="cpu").split(_BATCH):
                around = find_ball_radii(
                    certifier.system, x[part].detach().cpu(), labels[part].cpu(), norm=norm,
                    box=box, seconds=seconds / _TRIALS,
                )  # fmt: skip
                radii[part] = torch.maximum(radii[part], around)
                if bar is not None:
                    bar.update(len(part))
    return radii.to(x.device)


def check_request(
    x: Tensor, labels: Tensor, norm: str, box: tuple[float, float] | None, seconds: float
) -> None:
    """Refuse inputs, a norm, a box or a time that no proof can start from.

    Args:
        x, labels, norm, box, seconds: as for `certified_radius`.

    Raises:
        ValueError: naming what does not fit.
    """
    if not isinstance(x, Tensor) or x.ndim < 2 or x.dtype not in (torch.float32, torch.float64):
        got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"x must be a batch of inputs in float32 or float64, got {got}: images of uint8 are "
            "scaled by lben.data.pixels"
        )
    if not isinstance(labels, Tensor) or labels.shape != x.shape[:1]:
        got = str(tuple(labels.shape)) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels must be a Tensor of {len(x)} integers, got {got}")
    if not (isinstance(seconds, int | float) and 0 <= seconds < math.inf):
        raise ValueError(f"seconds must be a number of at least 0, got {seconds!r}")
    InputRegion.around(x.flatten(1), 0.0, cast(InputNorm, norm), box)


def _bar(total: int, wanted: bool) -> Progress | nullcontext[None]:
    if not wanted:
        return nullcontext()
    from lben.progress import Progress  # it needs tqdm, which the package does without

    return Progress(total, "radii", "inputs")


def _check_shape(network: Network, shape: tuple[int, ...]) -> None:
    if network.input_shape != shape:
        raise ValueError(f"the network is for inputs of shape {network.input_shape}, got {shape}")


def _prove_own_bound(module: BoundedModule, shape: tuple[int, ...]) -> LipschitzCertificate:
    if isinstance(module, Classifier):
        bound = next(b for b in _BOUNDS if b in module.bounds)
        return module.certificate(shape, bound=bound)
    return module.certificate(shape)


def _find_system(module: nn.Module, shape: tuple[int, ...]) -> AffineSystem | None:
    """Return the equations of a module of this package, if they are known."""
    if isinstance(module, ConvertedNetwork):
        return AffineSystem.of_network(module.network)
    if type(module) is EquilibriumClassifier:
        mean, std = (t.detach().double() for t in (module.normalize.mean, module.normalize.std))
        return _equations(module.layer, *(t.expand(shape).reshape(-1) for t in (mean, std)))
    if type(module) is EquilibriumLinear:
        zero = torch.zeros(math.prod(shape), dtype=torch.float64, device="cpu")
        return _equations(module, zero, zero + 1)
    try:
        return AffineSystem.of_network(from_torch(module, shape))
    except ConversionError:
        return None


def _equations(layer: EquilibriumLinear, mean: Tensor, std: Tensor) -> AffineSystem | None:
    activation = _find_activation(layer.activation)
    if activation is None:
        return None
    return AffineSystem.of_weights(layer.weights(), activation, mean, std)


def _find_activation(activation: ProximalActivation) -> Activation | None:
    """Return the slopes and kinks of an activation, if they are known."""
    if type(activation) is LeakyReLU:
        return make_leaky_relu(activation.negative_slope)
    return {ReLU: RELU, Tanh: TANH}.get(type(activation))
