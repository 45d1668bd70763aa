"""Whether a converted network still computes what it did: compared in float64, on copies, before and after."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .compare import TOLERANCE, Results, largest_difference
from .fused_class import is_converted, restore
from .report import ConversionReport, Row


class Reference:
    """A network before its conversion.

    Args:
        model: the network.
        batch: what to run it on, or True for random images.
    """

    def __init__(self, model: nn.Module, batch: bool | Tensor) -> None:
        self.original = copy.deepcopy(model)
        self.batch = _images(model) if isinstance(batch, bool) else batch
        self.expected = _results(copy.deepcopy(self.original), self.batch)

    def compare(self, model: nn.Module, report: ConversionReport) -> None:
        """Sets report.verified, and reverts what differs: first the modules whose own output differs, then all."""
        report.verified = self.difference(model)
        if report.verified <= TOLERANCE:
            return
        for path in _differing(self.original, model, self.batch):
            self.revert(model, path, report)
        if self.difference(model) > TOLERANCE:
            for path, module in list(model.named_modules()):
                if is_converted(module):
                    self.revert(model, path, report)

    def difference(self, model: nn.Module) -> float:
        return largest_difference(_results(copy.deepcopy(model), self.batch), self.expected)

    @staticmethod
    def revert(model: nn.Module, path: str, report: ConversionReport) -> None:
        module = model.get_submodule(path)
        restore(module)
        report.converted = [row for row in report.converted if row.path != path]
        report.skipped.append(Row(path, type(module).__name__, "", "verify: gave other values; reverted"))


def _images(model: nn.Module) -> Tensor:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    shape = config.get("input_size", (3, 64, 64)) if isinstance(config, dict) else (3, 64, 64)
    # Enough samples that a batch norm on a map of one point has more than two values: of two it knows the sign alone.
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))


def _results(model: nn.Module, batch: Tensor) -> Results:
    """The outputs in evaluation, and the outputs, gradients and buffers of a training step, by name."""
    model = model.double()
    parameter = next(model.parameters(), None)
    device = batch.device if parameter is None else parameter.device
    x = batch.to(device, torch.float64, copy=True).requires_grad_()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    results: Results = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode(False):
        model.eval()
        with torch.no_grad():
            results |= {f"evaluation {i}": t for i, t in enumerate(tensors_in(model(x)))}
        model.train()
        torch.manual_seed(0)
        with torch.enable_grad():
            outputs = [t for t in tensors_in(model(x)) if t.requires_grad]
            loss = sum(
                (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=device).view_as(t)).sum() for t in outputs
            )
            gradients = torch.autograd.grad(loss, [x, *parameters.values()], allow_unused=True)  # type: ignore[arg-type]
    results |= {f"training {i}": t.detach() for i, t in enumerate(outputs)}
    results |= {
        f"gradient of {name}": g for name, g in zip(("input", *parameters), gradients, strict=True) if g is not None
    }
    results |= {f"buffer {name}": b.double() for name, b in model.named_buffers()}
    return results


def tensors_in(output: Any) -> list[Tensor]:
    flat, _ = torch.utils._pytree.tree_flatten(output)
    return [t for t in flat if isinstance(t, Tensor)]


def _differing(original: nn.Module, model: nn.Module, batch: Tensor) -> list[str]:
    """Paths of converted modules that give another output than the original's, each on the original's own input."""
    paths = [path for path, m in model.named_modules() if is_converted(m)]
    reference, converted = copy.deepcopy(original).double(), copy.deepcopy(model).double()
    differing = []
    inputs: dict[str, tuple[Any, ...]] = {}
    handles = [
        reference.get_submodule(path).register_forward_pre_hook(
            lambda m, args, path=path: inputs.setdefault(path, tuple(a.clone() for a in args)) and None
        )
        for path in paths
    ]
    for mode in (False, True):
        inputs.clear()
        with torch.no_grad(), torch.random.fork_rng():
            reference.train(mode)(batch.double())
            converted.train(mode)
            for path, arguments in inputs.items():
                outputs: list[Results] = []
                for m in (reference, converted):
                    torch.manual_seed(0)
                    outputs.append({"output": m.get_submodule(path)(*(a.clone() for a in arguments))})
                if path not in differing and largest_difference(outputs[1], outputs[0]) > TOLERANCE:
                    differing.append(path)
    for handle in handles:
        handle.remove()
    return differing
