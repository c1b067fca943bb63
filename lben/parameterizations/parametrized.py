"""How is a module pickled whose class torch's parametrizations have replaced?

torch refuses: it makes the class when a parametrization is registered, and no Python module holds
it. But the class follows from the original class and the names of the parametrized tensors, so
these are pickled, and the class is made again.
"""

from __future__ import annotations

from typing import Any, SupportsIndex

from torch import nn
from torch.nn.utils import parametrize


class PicklableParametrized(nn.Module):
    """A module that can be pickled and sent to other processes, parametrized or not."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        if not parametrize.is_parametrized(self):
            return super().__reduce_ex__(protocol)
        before = type(self).__mro__[1]
        return _rebuild_parametrized, (before, dict(self.__dict__))


def _rebuild_parametrized(kind: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = kind.__new__(kind)
    module.__dict__.update(state)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:  # type: ignore[union-attr]
        parametrize._inject_property(module, name)
    return module
