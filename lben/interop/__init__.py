"""Which networks come from elsewhere? Public checkpoints, read from their tensors.

Symbols: docs/glossary.md.
"""

from lben.interop.checkpoints import load_checkpoint

__all__ = ["load_checkpoint"]
