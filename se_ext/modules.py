"""The block as a module, a drop-in for torchvision's and timm's; and with the batch norm before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, nn

from . import functional
from ._fusion import BLOCKS, called_block, check_scriptable, excitation_of, scripted_tail, tail
from ._names import ACTIVATIONS, GATES, name_of

# TorchScript reads forward's annotations, so they say Optional[Tensor].
# ruff: noqa: UP045


# A call of an op's overload takes 0.3 µs less than a call of the op by its name.
_squeeze_excite = torch.ops.se_ext.squeeze_excite.default


class SqueezeExcitation(nn.Module):
    r"""The Squeeze-and-Excitation block: y = post(gate(W2 act(W1 mean(x) + b1) + b2) ⊙ x + residual).

    Signature and state_dict are those of torchvision.ops.SqueezeExcitation, and the keys those of timm's SEModule:
    `fc1.weight` [M, C, 1, 1], `fc1.bias` [M], `fc2.weight` [C, M, 1, 1], `fc2.bias` [C]. Checkpoints of both load as
    they are. `fc1` and `fc2` are Conv2d modules that hold the parameters (and their default initialisation); the
    computation is one fused op. It takes their place only while nothing else would happen in their call: with a hook, a
    forward or a class of their own, or a wrapped weight (adapters, pruning, quantisation), they are called, and the
    squeeze and the rescale stay fused. In their place may stand nn.Linear layers, which are fused too, or any modules.

    Args:
        input_channels: C, of the map.
        squeeze_channels: M, the squeezed width (the paper's C / r, r = 16).
        activation: of the squeezed layer: a torch.nn class (or module, or name) among Identity, ReLU, ReLU6, SiLU,
            GELU, Hardswish, LeakyReLU (slope 0.01), Tanh, Sigmoid.
        scale_activation: the gate: Sigmoid, Hardsigmoid, Tanh, ReLU or Identity.
        bias: whether the two layers have biases (the paper's have none).
        post_activation: applied last, after the residual; None for none.
        inplace: write the result into the input where no gradient is being recorded (torch.no_grad,
            torch.inference_mode). While grad mode is on the result is a new tensor.

    Shape:
        input [N, C, *spatial] with 1 to 3 spatial dims, residual of the same shape or None; output of input's shape,
        dtype and memory format.

    Raises:
        ValueError: an activation that the kernels do not compute, with the list of those they do.

    Source: Hu et al. 2017, "Squeeze-and-Excitation Networks", section 3.

    Example:
        >>> import torch, se_ext
        >>> se = se_ext.SqueezeExcitation(64, 4, post_activation=torch.nn.ReLU)
        >>> x, shortcut = torch.randn(2, 64, 7, 7), torch.randn(2, 64, 7, 7)
        >>> se(x, shortcut).shape
        torch.Size([2, 64, 7, 7])
    """

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: str | Callable[..., nn.Module] = nn.ReLU,
        scale_activation: str | Callable[..., nn.Module] = nn.Sigmoid,
        *,
        bias: bool = True,
        post_activation: str | Callable[..., nn.Module] | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1, bias=bias)
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1, bias=bias)
        self.activation = name_of("activation", activation, ACTIVATIONS)
        self.scale_activation = name_of("scale_activation", scale_activation, GATES)
        self.post_activation = name_of("post_activation", post_activation, ACTIVATIONS)
        self.inplace = inplace

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            state: Any = self.__dict__
            excitation: Any = excitation_of(state["_modules"])
            if excitation is None:
                return called_block(self, input, residual)
            w1, b1, w2, b2 = excitation
            if not state["inplace"]:
                activation, gate, post = state["activation"], state["scale_activation"], state["post_activation"]
                return _squeeze_excite(input, w1, b1, w2, b2, activation, gate, residual, post)
        else:
            w1, b1, w2, b2 = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        return functional.squeeze_excite(
            input,
            w1,
            b1,
            w2,
            b2,
            self.activation,
            self.scale_activation,
            residual,
            self.post_activation,
            self.inplace and not torch.is_grad_enabled(),
        )

    def __prepare_scriptable__(self) -> SqueezeExcitation:
        check_scriptable(self, None, self)
        return self

    def extra_repr(self) -> str:
        parts = [f"activation={self.activation}", f"scale_activation={self.scale_activation}"]
        if self.post_activation != "identity":
            parts.append(f"post_activation={self.post_activation}")
        if self.inplace:
            parts.append("inplace=True")
        return ", ".join(parts)


BLOCKS.add(SqueezeExcitation)


class BatchNormSqueezeExcitation(nn.Module):
    r"""Batch norm, activation, Squeeze-and-Excitation, shortcut and activation as one module, fused.

    y = post(drop_scale ⊙ s ⊙ u + residual), u = pre(batch_norm(x)), s the excitation of u. Its children `bn` (a
    BatchNorm2d) and `se` (a SqueezeExcitation) hold the parameters and buffers, so that the state_dict's keys are those
    of the two modules by themselves: `bn.weight`, `bn.running_mean`, …, `se.fc1.weight`, …. One of them that has hooks
    or a class of its own is called (with nothing but u, in the case of `se`), and the rest stays fused.

    Args:
        input_channels: C, of the map.
        squeeze_channels: M, the squeezed width.
        activation: of the squeezed layer; as in SqueezeExcitation.
        scale_activation: the gate; as in SqueezeExcitation.
        pre_activation: between batch norm and squeeze (MobileNetV3, EfficientNet); None for none.
        post_activation: applied last, after the residual (SE-ResNet); None for none.
        bias: whether the squeezed layers have biases.
        eps, momentum, affine, track_running_stats: as in torch.nn.BatchNorm2d.

    Shape:
        input [N, C, *spatial] with 1 to 3 spatial dims, residual of the same shape or None, drop_scale [N] or None
        (stochastic depth: 0 for a dropped sample, 1 / keep probability for the others); output of input's shape, dtype
        and memory format.

    Raises:
        ValueError: an activation that the kernels do not compute; when training, one value per channel.

    Source: Hu et al. 2017, "Squeeze-and-Excitation Networks", section 3 and figure 3; Ioffe and Szegedy 2015.

    Example:
        >>> import torch, se_ext
        >>> tail = se_ext.BatchNormSqueezeExcitation(64, 4, post_activation=torch.nn.ReLU)
        >>> x, shortcut = torch.randn(2, 64, 7, 7), torch.randn(2, 64, 7, 7)
        >>> tail(x, shortcut).shape
        torch.Size([2, 64, 7, 7])
    """

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: str | Callable[..., nn.Module] = nn.ReLU,
        scale_activation: str | Callable[..., nn.Module] = nn.Sigmoid,
        *,
        pre_activation: str | Callable[..., nn.Module] | None = None,
        post_activation: str | Callable[..., nn.Module] | None = None,
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(input_channels, eps, momentum, affine, track_running_stats)
        self.se = SqueezeExcitation(input_channels, squeeze_channels, activation, scale_activation, bias=bias)
        self.pre_activation = name_of("pre_activation", pre_activation, ACTIVATIONS)
        self.post_activation = name_of("post_activation", post_activation, ACTIVATIONS)

    def forward(self, input: Tensor, residual: Optional[Tensor] = None, drop_scale: Optional[Tensor] = None) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            modules: Any = self._modules
            pre, post = self.pre_activation, self.post_activation
            return tail(modules["bn"], modules["se"], input, residual, drop_scale, pre, post)
        return scripted_tail(
            input,
            self.bn.weight,
            self.bn.bias,
            self.bn.running_mean,
            self.bn.running_var,
            self.bn.num_batches_tracked,
            self.bn.momentum,
            self.bn.eps,
            self.bn.training,
            self.bn.track_running_stats,
            self.se.fc1.weight,
            self.se.fc1.bias,
            self.se.fc2.weight,
            self.se.fc2.bias,
            self.pre_activation,
            self.se.activation,
            self.se.scale_activation,
            residual,
            self.post_activation,
            drop_scale,
        )

    def __prepare_scriptable__(self) -> BatchNormSqueezeExcitation:
        check_scriptable(self, self.bn, self.se)
        return self

    def extra_repr(self) -> str:
        names = {"pre_activation": self.pre_activation, "post_activation": self.post_activation}
        return ", ".join(f"{key}={name}" for key, name in names.items() if name != "identity")
