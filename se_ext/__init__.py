"""se_ext: Squeeze-and-Excitation for PyTorch, as fused ops that train."""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from ._loader import LIBRARY as _LIBRARY
from ._loader import PACKAGE as _PACKAGE
from ._loader import load as _load

_load()

from . import _C, _flops, _inductor, _sharding, functional, models, onnx, reference  # noqa: E402, F401
from ._attention_functions import (  # noqa: E402
    channel_attention,
    concurrent_squeeze_excite,
    effective_squeeze_excite,
    efficient_channel_attention,
    gather_excite,
    length_mask,
    masked_squeeze,
    masked_squeeze_excite,
    scale_shift_squeeze_excite,
    spatial_squeeze_excite,
)
from .attention import (  # noqa: E402
    ChannelAttention,
    ConcurrentSqueezeExcitation,
    EffectiveSqueezeExcitation,
    EfficientChannelAttention,
    GatherExcite,
    MaskedSqueezeExcitation,
    ScaleShiftSqueezeExcitation,
    SpatialSqueezeExcitation,
)
from .functional import bn_squeeze_excite, depthwise_conv, excite, rescale, squeeze, squeeze_excite  # noqa: E402
from .modules import BatchNormSqueezeExcitation, SqueezeExcitation  # noqa: E402

if _TYPE_CHECKING:
    from .conversion import ConversionReport, InsertionReport, convert, insert_se, revert

_flops.register()
_inductor.register()
_sharding.register()

__version__ = "0.1.0"

# For C++ programs: the library that registers the ops, for dlopen, and the folder with the package for CMake:
# find_package(se_ext) where CMAKE_PREFIX_PATH has it.
library_path: str = str(_LIBRARY)
cmake_prefix_path: str = str(_PACKAGE / "cmake")


def __getattr__(name: str) -> _Any:
    """What changes a user's network is imported at its first use: it would take as long as all the rest."""
    if name not in ("ConversionReport", "InsertionReport", "convert", "insert_se", "revert"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import conversion

    value = globals()[name] = getattr(conversion, name)
    return value


__all__ = [
    "BatchNormSqueezeExcitation",
    "ChannelAttention",
    "ConcurrentSqueezeExcitation",
    "ConversionReport",
    "EffectiveSqueezeExcitation",
    "EfficientChannelAttention",
    "GatherExcite",
    "InsertionReport",
    "MaskedSqueezeExcitation",
    "ScaleShiftSqueezeExcitation",
    "SpatialSqueezeExcitation",
    "SqueezeExcitation",
    "bn_squeeze_excite",
    "channel_attention",
    "cmake_prefix_path",
    "concurrent_squeeze_excite",
    "convert",
    "depthwise_conv",
    "effective_squeeze_excite",
    "efficient_channel_attention",
    "excite",
    "functional",
    "gather_excite",
    "insert_se",
    "length_mask",
    "library_path",
    "masked_squeeze",
    "masked_squeeze_excite",
    "models",
    "onnx",
    "reference",
    "rescale",
    "revert",
    "scale_shift_squeeze_excite",
    "spatial_squeeze_excite",
    "squeeze",
    "squeeze_excite",
]
