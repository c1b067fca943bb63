"""Which networks come from elsewhere? Those of torch.nn and of ONNX, and public checkpoints.

Symbols: docs/glossary.md.
"""

from lben.interop.checkpoints import load_checkpoint
from lben.interop.comparison import Comparison, compare_outputs
from lben.interop.converted import ConvertedNetwork
from lben.interop.maps import ConversionError
from lben.interop.onnx_models import from_onnx
from lben.interop.pytorch import from_torch
from lben.interop.radius import RadiusCertifier, certified_radius

__all__ = [
    "Comparison",
    "ConversionError",
    "ConvertedNetwork",
    "RadiusCertifier",
    "certified_radius",
    "compare_outputs",
    "from_onnx",
    "from_torch",
    "load_checkpoint",
]
