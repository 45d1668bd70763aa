"""se_ext: Squeeze-and-Excitation for PyTorch, as fused ops that train."""

from ._loader import load as _load

_load()

from . import _C, _flops, _inductor, functional, models, onnx, reference  # noqa: E402, F401
from .functional import bn_squeeze_excite, excite, rescale, squeeze, squeeze_excite  # noqa: E402
from .modules import BatchNormSqueezeExcitation, SqueezeExcitation  # noqa: E402

_flops.register()
_inductor.register()

__version__ = "0.1.0"
__all__ = [
    "BatchNormSqueezeExcitation",
    "SqueezeExcitation",
    "bn_squeeze_excite",
    "excite",
    "functional",
    "models",
    "onnx",
    "reference",
    "rescale",
    "squeeze",
    "squeeze_excite",
]
