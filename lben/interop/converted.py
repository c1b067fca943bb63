"""How does a network without modules run in PyTorch, with its bound and its rounding?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lben.certificates import LipschitzCertificate, PairCertificate, certify
from lben.certificates.network import NetworkClaim
from lben.certificates.network_norms import prove_product_pairs
from lben.interop.rounding import Rounded, RoundingModel
from lben.layers.bounded import ErrorIn
from lben.layers.graphs import check_kind
from lben.layers.hooks import refuse_hooks
from lben.radii.error_bounds import Affine, Certified
from lben.tightening.routes import prove_by_size
from lben.weights.growth import norms_up
from lben.weights.network import Matrix, Network, is_sparse

_OUTWARDS = 1 + 2.0**-40


class ConvertedNetwork(nn.Module):
    """A network of blocks as a module with a proved bound.

    It computes in float64, on the device of x, and returns y in the dtype of x: so the rounding of
    float32 is that of y alone. It has no parameters; y is differentiable in x.

    Args:
        network: of `from_torch` or `from_onnx`.
        claim: of its bound, as `certify` takes it; when omitted, the tightest route that the size
            of the network allows finds one, once (lben/tightening/routes.py).
        pairs: a claim for every pair of outputs; products of norms are proved when omitted.

    Example:
        >>> import torch
        >>> from lben import ConvertedNetwork, LipschitzSequential, Normalize, from_torch
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Flatten(), torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        ... ).eval()
        >>> layer, x = ConvertedNetwork(from_torch(model, (1, 2, 2))), torch.rand(5, 1, 2, 2)
        >>> torch.allclose(layer(x), model(x), atol=1e-6)
        True
        >>> found = layer.forward_with_error(x, layer.certificate())
        >>> bool((found.error < 1e-5).all())
        True
        >>> chain = LipschitzSequential(Normalize((0.5,), (0.25,)), layer)
        >>> chain.certificate((1, 2, 2)).bound > layer.certificate().bound  # four times as large
        True
    """

    def __init__(
        self,
        network: Network,
        claim: NetworkClaim | None = None,
        pairs: Mapping[tuple[int, int], NetworkClaim] | None = None,
    ) -> None:
        super().__init__()
        self.fingerprint = network.fingerprint
        self._network, self._claim, self._pairs = network, claim, pairs
        self._certificate: LipschitzCertificate | None = None
        self._rounding = RoundingModel(network)
        self._placed: dict[torch.device, list[_Map]] = {}

    @property
    def network(self) -> Network:
        """The network."""
        return self._network

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one x."""
        return self._network.input_shape

    def forward(self, x: Float[Tensor, "*batch_and_sample"]) -> Float[Tensor, "*batch q"]:
        """Return y.

        Args:
            x: float32 or float64; any batch dimensions before those of a sample.

        Raises:
            ValueError: for another shape or dtype.
        """
        check_kind(x)
        shape = self.sample_shape
        rank = x.ndim - len(shape)
        if rank < 0 or tuple(x.shape[rank:]) != shape:
            raise ValueError(
                f"expected (*batch, {', '.join(map(str, shape))}), got {tuple(x.shape)}"
            )
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"expected float32 or float64, got {x.dtype}: convert x")
        states = [x.reshape(-1, self._network.widths[0]).T.double()]
        *maps, output = self._on(x.device)
        for block, affine in zip(self._network.blocks, maps, strict=True):
            states.append(block.activation(affine(states)))
        return output(states).T.to(x.dtype).reshape(*x.shape[:rank], -1)

    def _on(self, device: torch.device) -> list[_Map]:
        """Return the numbers on a device."""
        if device not in self._placed:
            network = self._network
            maps = [*(block.affine for block in network.blocks), network.output]
            self._placed[device] = [
                _Map(
                    {j: _to_tensor(m, device) for j, m in affine.matrices.items()},
                    torch.tensor(affine.bias, device=device)[:, None],
                )
                for affine in maps
            ]
        return self._placed[device]

    def certificate(self, image: tuple[int, ...] | None = None) -> LipschitzCertificate:
        """Prove a Lipschitz bound of the exact network, once: the network does not change.

        Args:
            image: the shape of one sample, or None; only that of the network.

        Raises:
            ValueError: for another shape.
            CertificateError: if the proof fails.
        """
        shape = self.sample_shape
        if image is not None and tuple(image) not in (shape, shape[1:]):
            raise ValueError(f"the network is for samples of shape {shape}, got {tuple(image)}")
        if self._certificate is None:
            self._certificate = (
                prove_by_size(self._network)
                if self._claim is None
                else certify(self._network, self._claim)
            )
        return self._certificate

    def pair_certificate(self) -> PairCertificate:
        """Prove bounds of yᵢ − yⱼ for every pair of outputs of the exact network.

        Raises:
            CertificateError: if the proof fails.
        """
        if self._pairs is None:
            return prove_product_pairs(self._network)
        return certify(self._network, self._pairs)

    @torch.no_grad()
    def forward_with_error(
        self,
        x: Float[Tensor, "*batch_and_sample"],
        certificate: LipschitzCertificate,
        error_in: ErrorIn = 0.0,
    ) -> Certified:
        """Return y as it runs, with bounds of its distance to the exact y.

        Args:
            x: as `forward` takes it.
            certificate: of this network.
            error_in: bound of the l2 distance of x to the exact input, per sample.

        Returns:
            y with bounds of ‖y − y*‖₂ per sample: at x, and at every input in a ball around x.

        Raises:
            CertificateError: if the certificate is of something else, or the module has hooks.
        """
        refuse_hooks(self)
        certificate.check_fingerprint(self.fingerprint)
        y = self(x)
        flat = x.detach().double().cpu().reshape(-1, self._network.widths[0]).numpy()
        found = self._rounding.evaluate(flat)
        error, around = self._bounds(found, norms_up(y.flatten(0, -2), 1), x.dtype, x.device)
        batch = x.shape[: x.ndim - len(self.sample_shape)]
        return Certified(value=y, error=error.reshape(batch), uniform=around.reshape(batch)).after(
            error_in, certificate.bound
        )

    def _bounds(
        self, found: Rounded, size: Tensor, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Affine]:
        """Return the bounds of the error of y, with that of the conversion to the dtype of x."""
        info, norms = torch.finfo(dtype), self._rounding.norms
        error, slope = torch.from_numpy(found.error).to(device), found.slope
        reach = (norms.bound + slope) * _OUTWARDS  # how fast ‖y‖ grows with the distance
        if dtype == torch.float32:
            lost = math.sqrt(self._network.out_features) * info.tiny
            error = (error + info.eps * size + lost) * _OUTWARDS
            slope = (slope + info.eps * reach) * _OUTWARDS
        steepest = max(*norms.gains, norms.bound, 1.0) * max(
            [1.0, *(norm for map in norms.sizes for norm in map.values())]
        )
        room = (info.max / 8 - size - error) / max(reach, 1e-300)
        limit = room.clamp(-1.0, min(1e280 / steepest, 1e300))
        return error, Affine(error, slope, limit.nan_to_num(nan=-1.0))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_placed": {}}

    def extra_repr(self) -> str:
        """Describe the network in `repr`."""
        widths = " → ".join(map(str, (*self._network.widths, self._network.out_features)))
        return f"{widths}, {self._network.units} units"


class _Map:
    """v = Σ_j W_j z_j + b on columns."""

    def __init__(self, matrices: dict[int, Tensor], bias: Tensor) -> None:
        self.matrices, self.bias = matrices, bias

    def __call__(self, states: list[Tensor]) -> Tensor:
        v = self.bias.expand(-1, states[0].shape[1])
        for j, matrix in self.matrices.items():
            v = v + matrix @ states[j]
        return v


def _to_tensor(matrix: Matrix, device: torch.device) -> Tensor:
    """Return a copy of a matrix on a device."""
    if not is_sparse(matrix):
        return torch.tensor(matrix, device=device)
    entries = matrix.tocoo()
    return torch.sparse_coo_tensor(
        torch.from_numpy(np.stack(entries.coords).astype(np.int64)),
        torch.from_numpy(entries.data.copy()), matrix.shape, dtype=torch.float64,
        check_invariants=False,
    ).coalesce().to(device)  # fmt: skip
