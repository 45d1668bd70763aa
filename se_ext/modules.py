"""The SE block as a module, a drop-in for torchvision's and timm's; and with the batch norm before it."""

# Annotations are evaluated here (no `from __future__ import annotations`): torch.fx writes those of a traced module's
# forward into its code, and torch.save cannot write strings there.
import operator
from collections.abc import Callable
from typing import Any, Optional, SupportsIndex

import torch
from torch import Tensor, nn

from . import _ops, functional
from ._fusion import called_block, tail
from ._known import SE_BLOCKS, Layers, check_scriptable, excitation_of, normalization_from
from ._names import ACTIVATIONS, GATES, name_of
from ._ops import Excitation, Normalization

# TorchScript reads forward's annotations, so they say Optional[Tensor].
# ruff: noqa: UP045

# What other libraries call fc1 and fc2: timm's SqueezeExcite (EfficientNet, MobileNetV3); MONAI and others, whose
# layers are the first and third module of a Sequential.
_OTHER_NAMES = {"fc1.": ("conv_reduce.", "fc.0."), "fc2.": ("conv_expand.", "fc.2.")}


def at_least_one(argument: str, value: SupportsIndex) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"expected {argument} to be an integer, got {value!r} ({type(value).__name__})") from None
    if number < 1:
        raise ValueError(f"expected {argument} to be at least 1, got {number}")
    return number


def _spatial_dims(dims: SupportsIndex | None) -> int | None:
    if dims is None:
        return None
    number = at_least_one("dims", dims)
    if number > 3:
        raise ValueError(f"expected dims to be 1, 2, 3 or None, got {number}")
    return number


def _is_unbatched(input: Tensor, channels: int, dims: Optional[int]) -> bool:
    """Whether input is one map [C, *spatial] rather than a batch [N, C, *spatial]."""
    if dims is not None:
        if input.dim() != dims + 1 and input.dim() != dims + 2:
            raise ValueError(
                f"SqueezeExcitation: expected input of shape [N, C, *spatial] or [C, *spatial] with {dims} spatial "
                f"dims (the module's dims), got {list(input.shape)}"
            )
        return input.dim() == dims + 1
    if input.dim() != 3 or not _is_number_of_channels(input.size(0), channels):
        return False
    if _is_number_of_channels(input.size(1), channels):
        raise ValueError(
            f"SqueezeExcitation: expected an input that is either a batch [N, C, L] or one image [C, H, W], got "
            f"{list(input.shape)}, which with C = {channels} is both; pass dims=1 or dims=2 to the module"
        )
    return True


def _is_number_of_channels(size: int, channels: int) -> bool:
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        if torch.compiler.is_exporting():
            return _is_known_to_be(size, channels)
    return size == channels


def _is_known_to_be(size: int | torch.SymInt, number: int) -> bool:
    """False for a dynamic size, whose comparison would exclude the number from what the exported program accepts."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy, for exporters alone

    return statically_known_true(size == number)


class SqueezeExcitation(nn.Module):
    r"""The Squeeze-and-Excitation block: y = post(gate(W2 act(W1 mean(x) + b1) + b2) ⊙ x + residual).

    Signature and state_dict are those of torchvision.ops.SqueezeExcitation, and the keys those of timm's SEModule:
    `fc1.weight` [M, C, 1, 1], `fc1.bias` [M], `fc2.weight` [C, M, 1, 1], `fc2.bias` [C]. Checkpoints of both load as
    they are. So do those of timm's SqueezeExcite (EfficientNet, MobileNetV3: `conv_reduce`, `conv_expand`), those of
    MONAI (`fc.0`, `fc.2`), and weights of Linear, Conv1d or Conv3d layers ([M, C], [M, C, 1], …); they are saved as
    `fc1` and `fc2`. `fc1` and `fc2` are Conv2d modules that hold the parameters (and their default initialisation); the
    computation is one fused op. It takes their place only while nothing else would happen in their call: with a hook, a
    forward or a class of their own, or a wrapped weight (adapters, pruning, quantisation), they are called, and the
    squeeze and the rescale stay fused. In their place may stand nn.Linear layers, which are fused too, or any modules.

    Args:
        input_channels: C, of the map.
        squeeze_channels: M, the squeezed width (the paper's C / r, r = 16).
        activation: of the squeezed layer: Identity, ReLU, ReLU6, SiLU, GELU, Hardswish, LeakyReLU (slope 0.01), Tanh
            or Sigmoid, as a torch.nn class, a module, a function of torch or torch.nn.functional, a callable that makes
            a module, or the name that the functions take ("silu"). A class of timm, torchvision, MONAI and the like
            is recognised by what it computes; of a class of your own pass the name.
        scale_activation: the gate, likewise: Sigmoid, Hardsigmoid, Tanh, ReLU, Identity or "double_sigmoid"
            (2 · sigmoid).
        bias: whether the two layers have biases (the paper's have none).
        post_activation: applied last, after the residual; None for none.
        inplace: write the result into the input where no gradient is being recorded (torch.no_grad,
            torch.inference_mode). While grad mode is on the result is a new tensor.
        dims: the number of spatial dims, 1 to 3; None: told from the input, which is only in doubt where it has three
            dims (below).

    Shape:
        input [N, C, *spatial] with 1 to 3 spatial dims, or one map [C, *spatial]; residual of the same shape or None;
        output of input's shape, dtype and memory format. With `dims` the number of dims tells which of the two it is.
        Without, an input of four or five dims is a batch, and one of three dims is a batch [N, C, L] where its second
        size is C, or one image [C, H, W] where its first is. torch.fx.symbolic_trace traces a batch.

    Raises:
        ValueError: an activation that the kernels do not compute, with the list of those they do; a number of channels
            below 1; an input of three dims whose first two sizes are both C, without `dims`.
        TypeError: a number of channels that is no integer.

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
        activation: str | Callable[..., Any] = nn.ReLU,
        scale_activation: str | Callable[..., Any] = nn.Sigmoid,
        *,
        bias: bool = True,
        post_activation: str | Callable[..., Any] | None = None,
        inplace: bool = False,
        dims: int | None = None,
    ) -> None:
        super().__init__()
        input_channels = at_least_one("input_channels", input_channels)
        squeeze_channels = at_least_one("squeeze_channels", squeeze_channels)
        self.input_channels = input_channels
        self.dims = _spatial_dims(dims)
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1, bias=bias)
        self.fc2 = nn.Conv2d(squeeze_channels, input_channels, 1, bias=bias)
        self.activation = name_of("activation", activation, ACTIVATIONS)
        self.scale_activation = name_of("scale_activation", scale_activation, GATES)
        self.post_activation = name_of("post_activation", post_activation, ACTIVATIONS)
        self.inplace = inplace

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            state: Any = self.__dict__
            # torch.fx traces a batch: its proxies are no Tensors, and have no number of dims to compare.
            if isinstance(input, Tensor) and (input.dim() == 3 or state["dims"] is not None):
                if _is_unbatched(input, state["input_channels"], state["dims"]):
                    output = self.forward(input.unsqueeze(0), None if residual is None else residual.unsqueeze(0))
                    in_place = state["inplace"] and not torch.is_grad_enabled()
                    return _ops.written(input) if in_place else output.squeeze(0)
            modules = state["_modules"]
            known: Any = excitation_of(modules["fc1"], modules["fc2"])
            if known is None:
                return called_block(self, input, residual)
            w1, b1, w2, b2 = known
            activation, gate, post = state["activation"], state["scale_activation"], state["post_activation"]
            if state["inplace"] and not torch.is_grad_enabled():
                _ops.squeeze_excite_(input, w1, b1, w2, b2, activation, gate, residual, post)
                return _ops.written(input)
            return _ops.squeeze_excite(input, w1, b1, w2, b2, activation, gate, residual, post)
        unbatched = _is_unbatched(input, self.input_channels, self.dims)
        batch = input
        if unbatched:
            batch = input.unsqueeze(0)
            residual = None if residual is None else residual.unsqueeze(0)
        in_place = self.inplace and not torch.is_grad_enabled()
        excitation = self._scripted_excitation()
        output = functional.squeeze_excite(
            batch, *excitation, self.activation, self.scale_activation, residual, self.post_activation, in_place
        )
        if unbatched:
            return _ops.written(input) if in_place else output.squeeze(0)
        return output

    def _scripted_excitation(self) -> Excitation:
        return self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias

    def _scripted_tail(
        self,
        input: Tensor,
        normalization: Normalization,
        pre_activation: str,
        drop_scale: Optional[Tensor],
        residual: Optional[Tensor],
        post_activation: str,
    ) -> Tensor:
        """What _fusion.tail computes, for the scripts of the modules that have this block behind a batch norm."""
        return _ops.squeeze_excite_behind_batch_norm(
            input,
            normalization,
            self._scripted_excitation(),
            pre_activation,
            self.activation,
            self.scale_activation,
            residual,
            post_activation,
            drop_scale,
        )

    def __prepare_scriptable__(self) -> "SqueezeExcitation":
        check_scriptable(self, None, self)
        return self

    def extra_repr(self) -> str:
        parts = [f"activation={self.activation}", f"scale_activation={self.scale_activation}"]
        if self.post_activation != "identity":
            parts.append(f"post_activation={self.post_activation}")
        if self.inplace:
            parts.append("inplace=True")
        if self.dims is not None:
            parts.append(f"dims={self.dims}")
        return ", ".join(parts)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "dims" not in self.__dict__:  # pickled by a version that had no such argument
            self.dims = None
            self.input_channels = self.fc1.in_channels

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes the names and shapes of other libraries' layers; fc1 and fc2 then load what is theirs."""
        for layer, other_names in _OTHER_NAMES.items():
            ours = prefix + layer
            for other in other_names:
                theirs = prefix + other
                if not any(key.startswith(ours) for key in state_dict):
                    for key in [key for key in state_dict if key.startswith(theirs)]:
                        state_dict[ours + key[len(theirs) :]] = state_dict.pop(key)
            weight = state_dict.get(ours + "weight")
            if not isinstance(weight, Tensor) or not isinstance(self._modules[layer[:-1]], nn.Conv2d):
                continue
            if weight.dim() in (2, 3, 5) and all(size == 1 for size in weight.shape[2:]):
                state_dict[ours + "weight"] = weight.detach().reshape(*weight.shape[:2], 1, 1)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _layers_of(se: Any) -> Layers | None:
    state = se.__dict__
    if state["post_activation"] != "identity" or state["inplace"]:
        return None
    modules = state["_modules"]
    return modules["fc1"], modules["fc2"], state["activation"], state["scale_activation"]


SE_BLOCKS[SqueezeExcitation] = _layers_of


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
        input [N, C, *spatial] with 1 to 3 spatial dims, always a batch: a batch norm's statistics are those of one.
        residual of the same shape or None, drop_scale [N] or None (stochastic depth: 0 for a dropped sample, 1 / keep
        probability for the others); output of input's shape, dtype and memory format.

    Raises:
        ValueError: an activation that the kernels do not compute; a number of channels below 1; when training, one
            value per channel.
        TypeError: a number of channels that is no integer.

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
        activation: str | Callable[..., Any] = nn.ReLU,
        scale_activation: str | Callable[..., Any] = nn.Sigmoid,
        *,
        pre_activation: str | Callable[..., Any] | None = None,
        post_activation: str | Callable[..., Any] | None = None,
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__()
        input_channels = at_least_one("input_channels", input_channels)
        self.bn = nn.BatchNorm2d(input_channels, eps, momentum, affine, track_running_stats)
        self.se = SqueezeExcitation(input_channels, squeeze_channels, activation, scale_activation, bias=bias)
        self.pre_activation = name_of("pre_activation", pre_activation, ACTIVATIONS)
        self.post_activation = name_of("post_activation", post_activation, ACTIVATIONS)

    def forward(self, input: Tensor, residual: Optional[Tensor] = None, drop_scale: Optional[Tensor] = None) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            modules: Any = self._modules
            pre, post = self.pre_activation, self.post_activation
            return tail(modules["bn"], modules["se"], input, (drop_scale, residual), pre, post)
        bn = self.bn
        buffers = bn.running_mean, bn.running_var, bn.num_batches_tracked
        normalization = normalization_from(
            bn.weight, bn.bias, buffers, bn.training, bn.track_running_stats, bn.momentum, bn.eps
        )
        pre, post = self.pre_activation, self.post_activation
        return self.se._scripted_tail(input, normalization, pre, drop_scale, residual, post)

    def __prepare_scriptable__(self) -> "BatchNormSqueezeExcitation":
        check_scriptable(self, self.bn, self.se)
        return self

    def extra_repr(self) -> str:
        names = {"pre_activation": self.pre_activation, "post_activation": self.post_activation}
        return ", ".join(f"{key}={name}" for key, name in names.items() if name != "identity")
