"""Other runtimes that a user would pick for inference, each an optional package: ONNX Runtime and OpenVINO."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.problem import to_layout
from benchmarks.summary import ONNX_RUNTIME, OPENVINO

Logits = Callable[[], Tensor]

EXPORTER = ("onnx", "onnxscript")
NAMES = (ONNX_RUNTIME, OPENVINO)


def installed() -> dict[str, str]:
    """The versions of those of the packages, the exporter's among them, that are installed."""
    found = {}
    for package in (*EXPORTER, *NAMES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def available(versions: dict[str, str]) -> tuple[tuple[str, ...], list[str]]:
    """The runtimes that can be timed, and what the results file says of the others."""
    found, notes = [], []
    for name in NAMES:
        missing = [package for package in (*EXPORTER, name) if package not in versions]
        if missing:
            notes.append(f"{name} is left out, because these are not installed: {', '.join(missing)}")
        else:
            found.append(name)
    return tuple(found), notes


def load(names: Sequence[str], network: nn.Module, images: Tensor) -> dict[str, Logits]:
    """For each runtime, a call that returns the network's logits for the images, on torch's number of threads."""
    if not names:
        return {}
    images = images.contiguous()
    model = export(to_layout(copy.deepcopy(network), "nchw"), images)
    return {name: LOADERS[name](model, images) for name in names}


def export(network: nn.Module, images: Tensor) -> bytes:
    """The network as an ONNX model for the shape of the images."""
    program = torch.onnx.export(network, (images,), dynamo=True, verbose=False)
    assert program is not None, "the exporter returns a program where it is given no file"
    model: bytes = program.model_proto.SerializeToString()
    return model


def onnx_runtime(model: bytes, images: Tensor) -> Logits:
    onnxruntime: Any = importlib.import_module(ONNX_RUNTIME)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads go on to spin after a call, by default, and would take their CPU from the next variant.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def openvino(model: bytes, images: Tensor) -> Logits:
    core: Any = importlib.import_module(OPENVINO).Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 by default, on a CPU that has it
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    inputs = [images.numpy()]
    return lambda: torch.from_numpy(request.infer(inputs, share_inputs=True, share_outputs=True)[0])


LOADERS: dict[str, Callable[[bytes, Tensor], Logits]] = {ONNX_RUNTIME: onnx_runtime, OPENVINO: openvino}
