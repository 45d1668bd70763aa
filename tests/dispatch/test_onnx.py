"""ONNX: what torch.onnx.export writes with our table is standard ONNX, and computes what torch computes."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from helpers import ACTIVATIONS, GATES, assert_close, assert_near, make_map
from onnx.reference import ReferenceEvaluator
from ops import BY_NAME, OpCase, Options, cases, in_float64
from timm_networks import random_statistics, replace_blocks, timm_network
from torch import Tensor, nn
from torch.export import Dim

import se_ext

quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
pytestmark = [pytest.mark.cpu_only, quiet]

C, M = 16, 4
LAYOUTS = [((37,), False), ((5, 7), False), ((3, 4, 3), False)]  # 1 to 3 spatial dims; ONNX has no strides
# Dtypes of maps and of weights.
SINGLE, DOUBLE = [(torch.float32, torch.float32)], [(torch.float64, torch.float64)]
HALF = [(half, weights) for half in (torch.bfloat16, torch.float16) for weights in (half, torch.float32)]
ATTRIBUTES = torch.float32  # ONNX's attributes (a slope, say) are float32, beside float64 tensors too


def export(module: nn.Module, args: tuple[Tensor, ...], **options: Any) -> Any:
    table = se_ext.onnx.translation_table()
    return torch.onnx.export(module, args, dynamo=True, verbose=False, custom_translation_table=table, **options)


def assert_standard(program: Any) -> None:
    """Valid, and of ONNX's own operators alone."""
    onnx.checker.check_model(program.model_proto, full_check=True)
    assert {node.domain for node in program.model.graph} == {""}
    assert not program.model.functions


# ---- ops ----


def may_be_traced(case: OpCase) -> bool:
    """Not autograd's, and none that writes: tracing makes functional ops of those."""
    return not case.name.endswith(("_forward", "_backward")) and not case.writes


class Calls(nn.Module):
    """Calls of an op, one after the other; the tensors among their arguments are the inputs."""

    def __init__(self, case: OpCase, calls: list[dict[str, Any]]) -> None:
        super().__init__()
        self.op, self.calls = case.op, calls

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for call in self.calls for t in call.values() if isinstance(t, Tensor))

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        given, outputs = iter(tensors), []
        for call in self.calls:
            found = self.op(**{k: next(given) if isinstance(v, Tensor) else v for k, v in call.items()})
            outputs += [found] if isinstance(found, Tensor) else found
        return outputs


def run_by_definition(program: Any, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """By ONNX's own reference implementation: ONNX Runtime has only a part of the operators in float64."""
    names = [value.name for value in program.model.graph.inputs]
    given = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    return [torch.tensor(y) for y in ReferenceEvaluator(program.model_proto).run(None, given)]


def rows_of(case: OpCase, dtypes: list[tuple[torch.dtype, torch.dtype]]) -> list[Options]:
    """Every pair of values of two options, and every activation and gate in every place."""
    one = {"activation": ["relu"], "pre_activation": ["relu"], "post_activation": ["relu"], "gate": ["sigmoid"]}
    rows = case.variations(crossed=(), layout=LAYOUTS, dtypes=dtypes, **one)

    def turned(row: int) -> Options:
        first, second, third = (ACTIVATIONS[(row + turn) % len(ACTIVATIONS)] for turn in range(3))
        gate = GATES[row % len(GATES)]
        options = rows[row % len(rows)]
        return replace(options, activation=first, pre_activation=second, post_activation=third, gate=gate)

    return [turned(row) for row in range(max(len(rows), len(ACTIVATIONS)))]


@cases(may_be_traced)
def test_every_op_with_every_argument(case: OpCase) -> None:
    rows = [*rows_of(case, SINGLE), *rows_of(case, HALF)]
    calls = [case.make(options) for options in rows]
    module = Calls(case, calls).eval()
    program = export(module, module.tensors(), optimize=False)
    assert_standard(program)
    check(case, rows, calls, program(*module.tensors()))


def test_float64() -> None:
    case = BY_NAME["bn_squeeze_excite"]
    rows = rows_of(case, DOUBLE)
    calls = [case.make(options) for options in rows]
    module = Calls(case, calls).eval()
    program = export(module, module.tensors(), optimize=False)
    check(case, rows, calls, run_by_definition(program, module.tensors()))


def check(case: OpCase, rows: list[Options], calls: list[dict[str, Any]], found: Sequence[Tensor]) -> None:
    """Compares all outputs of the calls with the formula in float64."""
    outputs = iter(found)
    for options, call in zip(rows, calls, strict=True):
        for exact in case.exact(in_float64(call)):
            try:
                check_output(next(outputs), exact, case, options)
            except AssertionError as error:
                raise AssertionError(f"{options}: {error}") from None


def check_output(ours: Tensor, exact: Tensor | None, case: OpCase, options: Options) -> None:
    if exact is None:
        assert ours.numel() == 0
        return
    statistics = exact.dim() == 1
    assert ours.dtype is (options.accumulate if statistics else options.dtype)
    coarser = ATTRIBUTES if options.dtype is torch.float64 else options.dtype
    assert_close(ours, exact.detach(), coarser, case.summed(options)[0])


# ---- modules and networks ----


def test_a_block_with_dynamic_sizes() -> None:
    """Batch, height and width are those of the run; the residual and the activations are there. In the oldest set of
    operators that the exporter writes."""
    activations = {"pre_activation": nn.Hardswish, "post_activation": nn.ReLU}
    block = random_statistics(se_ext.BatchNormSqueezeExcitation(C, M, nn.SiLU, nn.Hardsigmoid, **activations))
    dynamic = {0: Dim("n", min=1, max=64), 2: Dim("h", min=1, max=256), 3: Dim("w", min=1, max=256)}
    examples = make_map((2, C, 6, 5)), make_map((2, C, 6, 5))
    program = export(block.eval(), examples, dynamic_shapes=(dynamic, dynamic), opset_version=18)
    assert_standard(program)
    for size in [(3, C, 6, 5), (1, C, 9, 4), (1, C, 1, 1)]:
        x, shortcut = make_map(size), make_map(size)
        (y,) = program(x, shortcut)
        assert_close(y, block(x, shortcut).detach().double(), torch.float32, C + M + 54)


def test_a_block_in_place_gives_its_output() -> None:
    """ONNX has no writing into an input; what the block would have written is the output."""
    network = nn.Sequential(nn.Conv2d(3, C, 3), se_ext.SqueezeExcitation(C, M, inplace=True), nn.Conv2d(C, C, 3)).eval()
    x = torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        program = export(network, (x,))
        assert_standard(program)
        assert_close(program(x)[0], network(x).double(), torch.float32, 9 * C)


class Depthwise(nn.Module):
    """With the padding whose zeros depend on the input's size at a stride of 2; and not, at a stride of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 5, groups=C)

    def forward(self, x: Tensor) -> list[Tensor]:
        weight, bias = self.conv.weight, self.conv.bias
        paddings: list[Any] = ["same", "valid", 2, (2, 1), (1, 2, 4, 0)]
        found = [se_ext.depthwise_conv(x, weight, bias, 2, padding) for padding in paddings]
        return [*found, se_ext.depthwise_conv(x, weight, None, 1, "same", 2)]


def test_depthwise_convolutions_with_dynamic_sizes() -> None:
    module = Depthwise().eval()
    dynamic = {0: Dim("n", min=1, max=64), 2: Dim("h", min=5, max=64), 3: Dim("w", min=5, max=64)}
    program = export(module, (make_map((2, C, 12, 9)),), dynamic_shapes=(dynamic,))
    assert_standard(program)
    for size in [(2, C, 12, 9), (1, C, 11, 14)]:
        x = make_map(size)
        for ours, eager in zip(program(x), module(x), strict=True):
            assert_close(ours, eager.detach().double(), torch.float32, 26)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "seresnet50": lambda: random_statistics(se_ext.models.seresnet50(num_classes=10)),
    "efficientnet_b0": lambda: replace_blocks(timm_network("efficientnet_b0")),
    "mobilenetv3_large_100": lambda: replace_blocks(timm_network("mobilenetv3_large_100")),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_with_a_dynamic_batch(name: str, tmp_path: Path, restore_threads: None) -> None:
    torch.set_num_threads(1)
    network = NETWORKS[name]().eval()
    batch = {0: Dim("batch", min=1, max=64)}
    export(network, (torch.randn(2, 3, 64, 64),), dynamic_shapes=(batch,)).save(tmp_path / "network.onnx")
    nodes = onnx.load(tmp_path / "network.onnx").graph.node
    assert {node.domain for node in nodes} == {""}
    assert "BatchNormalization" not in {node.op_type for node in nodes}  # folded into the convolutions
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3):
        images = torch.randn(count, 3, 64, 64)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            expected = network(images)
        assert_near(torch.from_numpy(logits), expected, "logits", 1e-5)


# ---- what cannot be exported says so ----


def test_without_the_table_the_error_names_the_op() -> None:
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"No ONNX function found for .*se_ext\.squeeze_excite"):
        torch.onnx.export(se_ext.SqueezeExcitation(C, M).eval(), (make_map((2, C, 5, 4)),), dynamo=True, verbose=False)


def test_the_exporter_of_torchscript_names_the_op() -> None:
    module, args = se_ext.SqueezeExcitation(C, M).eval(), (make_map((2, C, 5, 4)),)
    with pytest.raises(torch.onnx.OnnxExporterError, match="unrecognized namespace se_ext::squeeze_excite"):
        torch.onnx.export(module, args, io.BytesIO(), dynamo=False)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "se_ext._onnx", raising=False)
    monkeypatch.delattr(se_ext, "_onnx", raising=False)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        ImportError, match=r"translation_table: .* none named onnxscript; .*pip install onnx onnxscript"
    ):
        se_ext.onnx.translation_table()
