"""How are raw pixels normalised, and by which factor does this raise the Lipschitz bound?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lben import precision
from lben.certificates import CertificateError, LipschitzCertificate
from lben.layers.bounded import RoundedModule
from lben.layers.fingerprint import fingerprint
from lben.layers.graphs import check_kind, check_numbers
from lben.layers.lasting import Lasting, make_lasting
from lben.layers.roundoff import Signal
from lben.rigorous import up
from lben.weights.growth import Growth, add_up, norm_up, times_up


class Normalize(RoundedModule, Lasting):
    """x ↦ (x − mean) / std per channel, as part of the model and of its bound.

    Args:
        mean: one number per channel.
        std: one positive number per channel.

    Raises:
        ValueError: if lengths differ or a std is not positive.

    Example:
        >>> import torch
        >>> from lben import Normalize
        >>> normalize = Normalize((0.5,), (0.25,))
        >>> normalize(torch.full((1, 1, 1, 2), 0.75)), normalize.certificate().bound
        (tensor([[[[1., 1.]]]]), 4.000000000000001)
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(0 < s < math.inf for s in std):
            raise ValueError(f"need one mean and one positive std per channel, got {mean}, {std}")
        stored = torch.tensor([*mean, *std], device="cpu")
        if not bool(stored.isfinite().all()) or not bool(
            (stored[len(mean) :] >= torch.finfo(stored.dtype).tiny).all()
        ):
            raise ValueError(f"mean and std must be numbers of {stored.dtype}, got {mean}, {std}")
        self._settings = {"mean": tuple(map(float, mean)), "std": tuple(map(float, std))}
        for name, values in self._settings.items():
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        make_lasting(self)

    # Note [Settings that move with the model]
    # mean and std belong to the configuration and not to the state, so no checkpoint restores them.
    # `to_empty` moves the buffers without their values. This method writes the values back: the old
    # ones, or the configured ones if the buffers were on the meta device, which has no values.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Normalize:
        before = {name: getattr(self, name) for name in self._settings}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if not new.is_meta and new is not old:
                with torch.inference_mode(False), torch.no_grad():
                    new.copy_(self._read_configured(name) if old.is_meta else old)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], *options: object) -> None:
        super()._load_from_state_dict(state_dict, *options)
        # load_state_dict(assign=True) takes parameters off the meta device without a call of
        # _apply.
        for name in self._settings:
            if getattr(self, name).is_meta:
                device = next((t.device for t in state_dict.values()), None)
                with torch.inference_mode(False):
                    value = self._read_configured(name).to(device, getattr(self, name).dtype)
                setattr(self, name, value)

    def _read_configured(self, name: str) -> Tensor:
        return torch.tensor(self._settings[name], device="cpu")[:, None, None]

    @property
    def gain(self) -> float:
        """Lipschitz constant in l2: 1 / smallest std, rounded upwards.

        Raises:
            CertificateError: if std is no longer real, finite and at least the smallest normal
                number.
        """
        std = self.std.detach()
        proper = std.is_floating_point() and bool(
            (std.isfinite() & (std >= torch.finfo(std.dtype).tiny)).all()
        )
        if not proper:
            raise CertificateError(
                "the std of a normalisation must be real, finite and positive, and no denormal "
                f"number, got {std.flatten().tolist()}: set it to that of the images again"
            )
        return up(1 / float(std.min()))

    @property
    def sample_shape(self) -> tuple[int | None, ...]:
        """The shape of one image; None for its height and width."""
        return (len(self.mean), None, None)

    def certificate(self, image: tuple[int, ...] | None = None) -> LipschitzCertificate:
        """Return the certificate of the bound 1 / smallest std.

        Args:
            image: not read: the bound holds for images of every size.

        Raises:
            CertificateError: as `gain`; for a class that extends this one without a certificate of
                its own.
        """
        if type(self) is not Normalize:
            raise CertificateError(
                f"{type(self).__name__} extends Normalize, and what it computes is not known: give "
                "it a method certificate(image=None) of its own"
            )
        return LipschitzCertificate(
            bound=self.gain, margin=None, fingerprint=fingerprint(self),
            dtype=str(self.mean.dtype).removeprefix("torch."),
            method="1 / smallest std, rounded upwards",
        )  # fmt: skip

    def check(self, certificate: LipschitzCertificate, x: Tensor) -> None:
        """Refuse a certificate of another map.

        Raises:
            CertificateError: if the fingerprint differs.
        """
        certificate.check_fingerprint(self.certificate().fingerprint)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Return the normalised images.

        Raises:
            TypeError: if x is no tensor.
            ValueError: if x is of another dtype, but float32 where the layer is float64.
        """
        own = self.mean.dtype
        check_kind(x)
        check_numbers(x, None if own == torch.float64 and x.dtype == torch.float32 else own)
        return (x - self.mean) / self.std

    def rounding_growth(self, shape: tuple[int, ...], dtype: torch.dtype) -> Growth:
        """Return a bound of ‖fl(y) − y‖₂ that is affine in ‖x‖₂, for the mean and std as stored.

        Args:
            shape: of one image: channels, height, width.
            dtype: of the image.

        Returns:
            The bound as a function of ‖x‖₂.

        Raises:
            ValueError: if the shape does not fit or the dtype is neither float32 nor float64; under
                autocast.
            CertificateError: as `gain`.
        """
        precision.refuse_autocast()
        if dtype not in (torch.float32, torch.float64) or len(shape) != 3:
            raise ValueError(
                "expected the shape (channels, height, width) of an image in float32 or float64, "
                f"got {tuple(shape)} in {dtype}"
            )
        gain, run = self.gain, torch.promote_types(dtype, self.mean.dtype)
        pixels, entries = math.sqrt(math.prod(shape[1:])), math.sqrt(math.prod(shape))
        offset = times_up(norm_up(self.mean.double() / self.std.double()), pixels)
        # (x − mean)/std rounds twice. The difference loses at most three times the smallest normal
        # number, divided by std; the quotient loses three times that number more.
        size = Growth(offset, gain)
        tiny = torch.finfo(run).tiny
        lost = times_up(8 * tiny, add_up(gain, 1.0), entries)
        error = size.times(3 * torch.finfo(run).eps / 2).plus(lost)
        return Signal(run, size, error).below(Growth(times_up(norm_up(self.mean), pixels), 1.0))

    def box_slack(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch 2 channels height width"]:
        """Bound how far each normalised input can fall and rise within images in [0, 1]."""
        exact = x.double()
        room = torch.stack([exact, 1 - exact], dim=1).clamp_min(0) / self.std.double()
        return room * (1 + 2.0**-50)
