"""Modules of a user's own: with the two methods of BoundedModule, with one, with none."""

import dataclasses

import torch
from torch import nn

from lben import LipschitzCertificate
from lben.layers import GroupSort
from lben.layers.bounded import with_roundoff
from lben.radii.error_bounds import Certified
from lben.weights.growth import Growth, norms_up


class Stretch(nn.Module):
    """x ↦ cx, which rounds once."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x

    def certificate(self, image=None):
        return LipschitzCertificate(
            bound=self.factor, margin=None, fingerprint=f"{self.factor}x", dtype="any",
            method="by hand",
        )  # fmt: skip

    def forward_with_error(self, x, certificate, error_in=0.0):
        certificate.check_fingerprint(self.certificate().fingerprint)
        info = torch.finfo(x.dtype)
        growth = Growth(x[0].numel() * info.tiny, self.factor * info.eps)
        found = with_roundoff(self(x), norms_up(x, x.ndim - 1), growth)
        return found.after(error_in, certificate.bound)


class Silent(Stretch):
    """One that knows nothing of other inputs."""

    def forward_with_error(self, x, certificate, error_in=0.0) -> Certified:
        found = super().forward_with_error(x, certificate, error_in)
        return dataclasses.replace(found, uniform=None)


class Unbounded(nn.Module):
    """One that does not say how it rounds."""

    def certificate(self, image=None):
        return Stretch(1.0).certificate(image)


class Louder(GroupSort):
    """A fixed map that was changed, under the certificate of what it was."""

    def forward(self, x):
        return 10 * super().forward(x)


class Certain(Louder):
    """The same with a certificate of its own."""

    def certificate(self, image=None):
        return Stretch(10.0).certificate(image)

    def forward_with_error(self, x, certificate, error_in=0.0):
        found = Stretch(10.0).forward_with_error(x, certificate, error_in)
        return dataclasses.replace(found, value=self(x))
