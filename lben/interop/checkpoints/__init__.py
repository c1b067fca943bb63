"""How are networks read that other projects have saved? From the names of their tensors.

Symbols: docs/glossary.md.
"""

from lben.interop.checkpoints.load import load_checkpoint

__all__ = ["load_checkpoint"]
