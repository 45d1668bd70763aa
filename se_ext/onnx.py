"""ONNX: how torch.onnx.export writes the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["translation_table"]


def translation_table() -> dict[Any, Callable[..., Any]]:
    r"""The formula in ONNX's standard operators, for torch.onnx.export.

    The exporter writes for each op what the table says, so that no runtime needs this library. All arguments of the ops
    are translated: every activation and gate, 1 to 3 spatial dims, dynamic sizes, weights [M, C] and [M, C, 1, 1], a
    batch norm's own statistics. Half types are computed in float32, as in the kernels.

    Returns:
        The `custom_translation_table` of torch.onnx.export(..., dynamo=True): from the ops' overloads to functions of
        onnxscript.

    Raises:
        ImportError: the packages onnx and onnxscript, which torch.onnx.export needs too, are missing.

    Source: Hu et al. 2017, section 3, equations 2 to 4; the operators are those of ONNX's operator set 18.

    Example:
        >>> import torch, se_ext
        >>> se = se_ext.SqueezeExcitation(64, 4).eval()
        >>> program = torch.onnx.export(
        ...     se, (torch.randn(2, 64, 7, 7),), dynamo=True, verbose=False,
        ...     custom_translation_table=se_ext.onnx.translation_table(),
        ... )
        >>> {node.domain for node in program.model.graph}
        {''}
    """
    try:
        from . import _onnx
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("onnx", "onnxscript", "onnx_ir"):
            raise
        raise ImportError(
            f"se_ext.onnx.translation_table: expected the packages onnx and onnxscript, got none named {error.name}; "
            "install them with `pip install onnx onnxscript`",
            name=error.name,
        ) from error
    return _onnx.table()
