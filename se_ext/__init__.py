"""se_ext: Squeeze-and-Excitation for PyTorch, as fused ops that train."""

from ._loader import LIBRARY as _LIBRARY
from ._loader import PACKAGE as _PACKAGE
from ._loader import load as _load

_load()

from . import _C, _flops, _inductor, functional, models, onnx, reference  # noqa: E402, F401
from .conversion import InsertionReport, convert, insert_se, revert  # noqa: E402
from .functional import bn_squeeze_excite, excite, rescale, squeeze, squeeze_excite  # noqa: E402
from .modules import BatchNormSqueezeExcitation, SqueezeExcitation  # noqa: E402

_flops.register()
_inductor.register()

__version__ = "0.1.0"

# For C++ programs: the library that registers the ops, for dlopen, and the folder with the package for CMake:
# find_package(se_ext) where CMAKE_PREFIX_PATH has it.
library_path: str = str(_LIBRARY)
cmake_prefix_path: str = str(_PACKAGE / "cmake")

__all__ = [
    "BatchNormSqueezeExcitation",
    "InsertionReport",
    "SqueezeExcitation",
    "bn_squeeze_excite",
    "cmake_prefix_path",
    "convert",
    "excite",
    "functional",
    "insert_se",
    "library_path",
    "models",
    "onnx",
    "reference",
    "rescale",
    "revert",
    "squeeze",
    "squeeze_excite",
]
