"""The SE block's relatives as modules. Their layers are computed as one function where they are known (_known.py), and
called where they are not; the squeeze and the rescale are fused in both cases."""

# Annotations are evaluated here, as in modules.py.
import math
from collections.abc import Callable
from typing import Any, Literal, Optional

import torch
from torch import Tensor, nn

from . import _attention_functions as functions
from . import _attention_parts as parts
from ._fusion import call_layer
from ._known import is_called_plainly, is_known_layer
from ._names import ACTIVATIONS, GATES, name_of
from .functional import rescale, squeeze, squeeze_excite
from .modules import at_least_one

# TorchScript reads forward's annotations, so they say Optional[Tensor].
# ruff: noqa: UP045

Activation = str | Callable[..., Any]
_POOLS = ("mean", "mixed", "both")


class EffectiveSqueezeExcitation(nn.Module):
    r"""Effective Squeeze-and-Excitation, one layer from C to C: y = gate(W · mean(x) + b) ⊙ x.

    state_dict: `fc.weight` [C, C, 1, 1] and `fc.bias` [C], those of timm's EffectiveSEModule.

    Args:
        channels: C, of the map.
        scale_activation: the gate, as in SqueezeExcitation.
        add_maxpool: the layer takes (mean + maximum) / 2, as in timm.

    Shape:
        input [N, C, *spatial] with 1 to 3 spatial dims; output of input's shape, dtype and memory format.

    Raises:
        ValueError: a gate that is not known; a number of channels below 1.

    Source: Lee and Park 2020, "CenterMask: Real-Time Anchor-Free Instance Segmentation", section 3.3.

    Example:
        >>> import torch, se_ext
        >>> se_ext.EffectiveSqueezeExcitation(64)(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
    """

    def __init__(
        self, channels: int, scale_activation: Activation = nn.Hardsigmoid, *, add_maxpool: bool = False
    ) -> None:
        super().__init__()
        channels = at_least_one("channels", channels)
        self.fc = nn.Conv2d(channels, channels, 1)
        self.scale_activation = name_of("scale_activation", scale_activation, GATES)
        self.pool = "mixed" if add_maxpool else "mean"

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if not is_known_layer(self.fc):
                t = call_layer(self.fc, parts.pooled("EffectiveSqueezeExcitation", input, self.pool)).flatten(1)
                return rescale(input, parts.gated("EffectiveSqueezeExcitation", self.scale_activation, t))
        return functions.effective_squeeze_excite(input, self.fc.weight, self.fc.bias, self.scale_activation, self.pool)

    def __prepare_scriptable__(self) -> "EffectiveSqueezeExcitation":
        _check_scriptable(self, {"fc": self.fc})
        return self

    def extra_repr(self) -> str:
        return f"scale_activation={self.scale_activation}, pool={self.pool}"


class _TwoLayers(nn.Module):
    """The parameters and names of a module with the two layers of an SE block."""

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        output_channels: int,
        activation: Activation,
        scale_activation: Activation,
        bias: bool,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(input_channels, squeeze_channels, 1, bias=bias)
        self.fc2 = nn.Conv2d(squeeze_channels, output_channels, 1, bias=bias)
        self.activation = name_of("activation", activation, ACTIVATIONS)
        self.scale_activation = name_of("scale_activation", scale_activation, GATES)

    def _are_layers_known(self) -> bool:
        """Both are judged before a weight is looked up, which may compute it."""
        return is_known_layer(self.fc1) and is_known_layer(self.fc2)

    def _called(self, z: Tensor) -> Tensor:
        """The second layer's output, by calls of both."""
        hidden = parts.activated(type(self).__name__, self.activation, call_layer(self.fc1, z))
        return call_layer(self.fc2, hidden).flatten(1)

    def _gate(self, t: Tensor) -> Tensor:
        return parts.gated(type(self).__name__, self.scale_activation, t)

    def __prepare_scriptable__(self) -> "_TwoLayers":
        _check_scriptable(self, {"fc1": self.fc1, "fc2": self.fc2})
        return self

    def extra_repr(self) -> str:
        return f"activation={self.activation}, scale_activation={self.scale_activation}"


class ChannelAttention(_TwoLayers):
    r"""Squeeze-and-Excitation with another squeeze, or with a constant times the gate: y = gain · s ⊙ x.

    With mlp(z) = fc2(activation(fc1(z))):

    pool="mean"    s = gate(mlp(mean))                     the SE block
    pool="mixed"   s = gate(mlp((mean + maximum) / 2))     timm's SEModule with add_maxpool
    pool="both"    s = gate(mlp(mean) + mlp(maximum))      the channel half of CBAM; timm's ChannelAttn

    state_dict: `fc1.weight` [M, C, 1, 1], `fc1.bias`, `fc2.weight` [C, M, 1, 1], `fc2.bias`, those of timm's modules.

    Args:
        input_channels: C, of the map.
        squeeze_channels: M, the squeezed width.
        activation: of the squeezed layer, as in SqueezeExcitation.
        scale_activation: the gate, likewise.
        bias: whether the two layers have biases (CBAM's in timm have none).
        pool: mean, mixed or both.
        gain: the constant (2 in an NFNet).

    Shape:
        input [N, C, *spatial] with 1 to 3 spatial dims; output of input's shape, dtype and memory format.

    Raises:
        ValueError: an activation or a pool that is not known; a number of channels below 1.

    Source: Woo et al. 2018, "CBAM: Convolutional Block Attention Module", section 3.1, equation 2 (both); Brock et al.
    2021, "High-Performance Large-Scale Image Recognition Without Normalization", section 4.1 (gain).

    Example:
        >>> import torch, se_ext
        >>> se_ext.ChannelAttention(64, 4, bias=False, pool="both")(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
    """

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: Activation = nn.ReLU,
        scale_activation: Activation = nn.Sigmoid,
        *,
        bias: bool = True,
        pool: str = "mean",
        gain: float = 1.0,
    ) -> None:
        channels = at_least_one("input_channels", input_channels)
        hidden = at_least_one("squeeze_channels", squeeze_channels)
        super().__init__(channels, hidden, channels, activation, scale_activation, bias)
        if pool not in _POOLS:
            raise ValueError(f"expected pool to be one of {', '.join(_POOLS)}, got {pool!r}")
        self.pool = pool
        self.gain = float(gain)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if not self._are_layers_known():
                if self.pool == "both":
                    t = self._called(squeeze(input)) + self._called(parts.maximum(input))
                else:
                    t = self._called(parts.pooled("channel_attention", input, self.pool))
                return rescale(input, self.gain * self._gate(t))
        return functions.channel_attention(
            input,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            self.activation,
            self.scale_activation,
            self.pool,
            self.gain,
        )

    def extra_repr(self) -> str:
        gain = "" if self.gain == 1 else f", gain={self.gain}"
        return f"{super().extra_repr()}, pool={self.pool}{gain}"


class EfficientChannelAttention(nn.Module):
    r"""Efficient Channel Attention (ECA): y = gate(conv(mean(x))) ⊙ x, a convolution over the channels.

    state_dict: `conv.weight` [1, 1, k], that of timm's EcaModule and CecaModule. The convolution is always called.

    Args:
        channels: C, of which k follows: (log2 C + beta) / gamma, cut to an integer and made odd, at least 3. None:
            kernel_size is taken.
        kernel_size: k, odd; not looked at where channels is given.
        gamma, beta: as above.
        scale_activation: the gate, as in SqueezeExcitation.
        circular: whether the first channel is the neighbour of the last one (timm's CecaModule), else the border is 0.

    Shape:
        input [N, C, *spatial] with 1 to 3 spatial dims; output of input's shape, dtype and memory format.

    Raises:
        ValueError: a gate that is not known; a number of channels below 1; an even kernel_size.

    Source: Wang et al. 2020, "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
    section 3.2 and, for k, equation 12.

    Example:
        >>> import torch, se_ext
        >>> eca = se_ext.EfficientChannelAttention(256)
        >>> eca.conv.kernel_size, eca(torch.randn(2, 256, 7, 7)).shape
        ((5,), torch.Size([2, 256, 7, 7]))
    """

    def __init__(
        self,
        channels: int | None = None,
        kernel_size: int = 3,
        gamma: float = 2,
        beta: float = 1,
        scale_activation: Activation = nn.Sigmoid,
        *,
        circular: bool = False,
    ) -> None:
        super().__init__()
        if channels is not None:
            t = int(abs(math.log2(at_least_one("channels", channels)) + beta) / gamma)
            kernel_size = max(t if t % 2 else t + 1, 3)
        if at_least_one("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"expected kernel_size to be odd, got {kernel_size}")
        border: Literal["circular", "zeros"] = "circular" if circular else "zeros"
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False, padding_mode=border)
        self.scale_activation = name_of("scale_activation", scale_activation, GATES)

    def forward(self, input: Tensor) -> Tensor:
        z = squeeze(input).to(self.conv.weight.dtype)  # float32 weights beside a half-typed map
        t = self.conv(z.unsqueeze(1)).squeeze(1)
        return rescale(input, parts.gated("EfficientChannelAttention", self.scale_activation, t))

    def extra_repr(self) -> str:
        return f"scale_activation={self.scale_activation}"


class GatherExcite(nn.Module):
    r"""Gather-Excite without parameters: y = gate(the mean around each point) ⊙ x.

    Args:
        extent: 0 for the mean of the whole map, else an even number; see the function gather_excite.
        scale_activation: the gate, as in SqueezeExcitation.

    Shape:
        input [N, C, *spatial] with 1 to 3 spatial dims; output of input's shape, dtype and memory format.

    Raises:
        ValueError: a gate that is not known; an odd extent.

    Source: Hu et al. 2018, "Gather-Excite: Exploiting Feature Context in Convolutional Neural Networks", section 3.2;
    timm's GatherExcite with extra_params=False and use_mlp=False.

    Example:
        >>> import torch, se_ext
        >>> se_ext.GatherExcite(extent=4)(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
    """

    def __init__(self, extent: int = 0, scale_activation: Activation = nn.Sigmoid) -> None:
        super().__init__()
        if extent < 0 or extent % 2 != 0:
            raise ValueError(f"expected extent to be 0 or an even number, got {extent}")
        self.extent = extent
        self.scale_activation = name_of("scale_activation", scale_activation, GATES)

    def forward(self, input: Tensor) -> Tensor:
        return functions.gather_excite(input, self.extent, self.scale_activation)

    def extra_repr(self) -> str:
        return f"extent={self.extent}, scale_activation={self.scale_activation}"


class SpatialSqueezeExcitation(nn.Module):
    r"""Spatial Squeeze-and-Excitation (sSE): y = sigmoid(W · x + b) ⊙ x, one gate a point.

    state_dict: `sSE.0.weight` [1, C, 1, 1] and `sSE.0.bias` [1], as in ConcurrentSqueezeExcitation.

    Args:
        channels: C, of the map.
        bias: whether the layer has a bias.

    Shape:
        input [N, C, *spatial] with 1 to 3 spatial dims; output of input's shape, dtype and memory format.

    Raises:
        ValueError: a number of channels below 1.

    Source: Roy et al. 2018, "Concurrent Spatial and Channel Squeeze & Excitation in Fully Convolutional Networks",
    section 2.2.

    Example:
        >>> import torch, se_ext
        >>> se_ext.SpatialSqueezeExcitation(64)(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
    """

    def __init__(self, channels: int, *, bias: bool = True) -> None:
        super().__init__()
        self.sSE = _spatial_layers(at_least_one("channels", channels), bias)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if not _is_known_sequence(self.sSE, (nn.Conv2d, nn.Sigmoid)):
                return parts.rescale_points(input, self.sSE(input).flatten(1))
        conv = self.sSE[0]
        return functions.spatial_squeeze_excite(input, conv.weight, conv.bias)  # type: ignore[arg-type]

    def __prepare_scriptable__(self) -> "SpatialSqueezeExcitation":
        _check_scriptable(self, {"sSE": self.sSE})
        return self


class ConcurrentSqueezeExcitation(nn.Module):
    r"""Concurrent spatial and channel Squeeze-and-Excitation (scSE): y = cSE(x) ⊙ x + sSE(x) ⊙ x.

    state_dict: `cSE.1.weight` [M, C, 1, 1], `cSE.1.bias`, `cSE.3.weight` [C, M, 1, 1], `cSE.3.bias`, `sSE.0.weight`
    [1, C, 1, 1], `sSE.0.bias`, those of segmentation_models_pytorch's SCSEModule.

    Args:
        input_channels: C, of the map.
        reduction: M = C // reduction.

    Shape:
        input [N, C, *spatial] with 1 to 3 spatial dims; output of input's shape, dtype and memory format.

    Raises:
        ValueError: a number of channels below the reduction.

    Source: Roy et al. 2018, "Concurrent Spatial and Channel Squeeze & Excitation in Fully Convolutional Networks",
    section 2.3.

    Example:
        >>> import torch, se_ext
        >>> se_ext.ConcurrentSqueezeExcitation(64)(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 64, 7, 7])
    """

    def __init__(self, input_channels: int, reduction: int = 16) -> None:
        super().__init__()
        channels, reduction = at_least_one("input_channels", input_channels), at_least_one("reduction", reduction)
        hidden = at_least_one("input_channels // reduction", channels // reduction)
        self.cSE = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )
        self.sSE = _spatial_layers(channels, bias=True)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            classes = (nn.AdaptiveAvgPool2d, nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Sigmoid)
            if not (_is_known_sequence(self.cSE, classes) and _is_known_sequence(self.sSE, (nn.Conv2d, nn.Sigmoid))):
                scale = self.cSE(input).flatten(1)
                return rescale(input, scale, parts.rescale_points(input, self.sSE(input).flatten(1)))
        fc1, fc2, conv = self.cSE[1], self.cSE[3], self.sSE[0]
        w1, b1, w2, b2 = fc1.weight, fc1.bias, fc2.weight, fc2.bias
        return functions.concurrent_squeeze_excite(input, w1, b1, w2, b2, conv.weight, conv.bias)  # type: ignore[arg-type]

    def __prepare_scriptable__(self) -> "ConcurrentSqueezeExcitation":
        _check_scriptable(self, {"cSE": self.cSE, "sSE": self.sSE})
        return self


class ScaleShiftSqueezeExcitation(_TwoLayers):
    r"""Squeeze-and-Excitation that gives a scale and a shift: y = post(sigmoid(s) ⊙ x + t + residual).

    (s, t) = fc2(activation(fc1(mean(x)))), s the first half. state_dict: `fc1.weight` [M, C, 1, 1], `fc1.bias`,
    `fc2.weight` [2C, M, 1, 1], `fc2.bias`.

    Args:
        input_channels: C, of the map.
        squeeze_channels: M, the squeezed width.
        activation: of the squeezed layer, as in SqueezeExcitation.
        bias: whether the two layers have biases.
        post_activation: applied last; None for none.

    Shape:
        input [N, C, *spatial] with 1 to 3 spatial dims; residual of the same shape or None; output of input's shape,
        dtype and memory format.

    Raises:
        ValueError: an activation that is not known; a number of channels below 1.

    Source: Leela Chess Zero, "Neural network topology" (the documentation of lc0), the SE layer of its residual block.

    Example:
        >>> import torch, se_ext
        >>> se = se_ext.ScaleShiftSqueezeExcitation(64, 8, post_activation=torch.nn.ReLU)
        >>> x, shortcut = torch.randn(2, 64, 8, 8), torch.randn(2, 64, 8, 8)
        >>> se(x, shortcut).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: Activation = nn.ReLU,
        *,
        bias: bool = True,
        post_activation: Activation | None = None,
    ) -> None:
        channels = at_least_one("input_channels", input_channels)
        hidden = at_least_one("squeeze_channels", squeeze_channels)
        super().__init__(channels, hidden, 2 * channels, activation, nn.Sigmoid, bias)
        self.post_activation = name_of("post_activation", post_activation, ACTIVATIONS)

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if not self._are_layers_known():
                return parts.scale_shift(input, self._called(squeeze(input)), residual, self.post_activation)
        return functions.scale_shift_squeeze_excite(
            input,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            self.activation,
            residual,
            self.post_activation,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}, post_activation={self.post_activation}"


class MaskedSqueezeExcitation(_TwoLayers):
    r"""Squeeze-and-Excitation over the valid points of padded sequences: y = gate(mlp(mean over the valid)) ⊙ x.

    state_dict: `fc1.weight` [M, C, 1, 1], `fc1.bias`, `fc2.weight` [C, M, 1, 1], `fc2.bias`. Checkpoints of
    SpeechBrain's SEBlock (`conv1.conv`, `conv2.conv`) load as they are.

    Args:
        input_channels: C, of the map.
        squeeze_channels: M, the squeezed width.
        activation: of the squeezed layer, as in SqueezeExcitation.
        scale_activation: the gate, likewise.
        bias: whether the two layers have biases.
        relative_lengths: whether lengths are parts of the longest sequence (SpeechBrain's), else numbers of points.

    Shape:
        input [N, C, *spatial] with 1 to 3 spatial dims; lengths [N] or None, with 1 spatial dim; mask [N, *spatial]
        (True: valid) or None; without both the mean is over all points. Output of input's shape, dtype and memory
        format. All points are rescaled. Input must be finite where it is not valid, too.

    Raises:
        ValueError: an activation that is not known; a number of channels below 1; both lengths and a mask.

    Source: Hu et al. 2017, section 3, over a part of the points; Desplanques et al. 2020, "ECAPA-TDNN", section 3.2.

    Example:
        >>> import torch, se_ext
        >>> se = se_ext.MaskedSqueezeExcitation(64, 16)
        >>> se(torch.randn(2, 64, 100), lengths=torch.tensor([1.0, 0.6])).shape
        torch.Size([2, 64, 100])
    """

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: Activation = nn.ReLU,
        scale_activation: Activation = nn.Sigmoid,
        *,
        bias: bool = True,
        relative_lengths: bool = True,
    ) -> None:
        channels = at_least_one("input_channels", input_channels)
        hidden = at_least_one("squeeze_channels", squeeze_channels)
        super().__init__(channels, hidden, channels, activation, scale_activation, bias)
        self.relative_lengths = relative_lengths

    def forward(self, input: Tensor, lengths: Optional[Tensor] = None, mask: Optional[Tensor] = None) -> Tensor:
        if lengths is not None:
            if mask is not None:
                raise ValueError("MaskedSqueezeExcitation: expected lengths or a mask, got both")
            if input.dim() != 3:
                raise RuntimeError(
                    f"MaskedSqueezeExcitation: expected input of shape [N, C, L] with lengths, got {list(input.shape)}"
                )
            mask = functions.length_mask(lengths, input.size(2), self.relative_lengths)
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if not self._are_layers_known():
                z = squeeze(input) if mask is None else functions.masked_squeeze(input, mask)
                return rescale(input, self._gate(self._called(z)))
        w1, b1, w2, b2 = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        if mask is None:
            return squeeze_excite(input, w1, b1, w2, b2, self.activation, self.scale_activation)
        return functions.masked_squeeze_excite(input, mask, w1, b1, w2, b2, self.activation, self.scale_activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relative_lengths={self.relative_lengths}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes the names and shapes of SpeechBrain's layers."""
        for ours, theirs in (("fc1", "conv1.conv"), ("fc2", "conv2.conv")):
            for kind in ("weight", "bias"):
                value = state_dict.pop(f"{prefix}{theirs}.{kind}", None)
                if value is not None:
                    state_dict[f"{prefix}{ours}.{kind}"] = value.unsqueeze(-1) if kind == "weight" else value
        super()._load_from_state_dict(state_dict, prefix, *args)


# ---- parts ----


def _spatial_layers(channels: int, bias: bool) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 1, 1, bias=bias), nn.Sigmoid())


def _is_known_sequence(sequence: Any, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether the sequence is one of exactly these classes, of which nothing would happen in a call but their formula.
    That a layer's kernel is 1x1 is for the function to check."""
    if type(sequence) is not nn.Sequential or not is_called_plainly(sequence) or len(sequence) != len(classes):
        return False
    return all(
        is_known_layer(child) if cls is nn.Conv2d else type(child) is cls and is_called_plainly(child)
        for child, cls in zip(sequence, classes, strict=True)
    )


def _check_scriptable(module: nn.Module, children: dict[str, Any]) -> None:
    """Raises RuntimeError where a script, which takes the parameters of the children, would leave out what happens when
    they are called."""
    for name, child in children.items():
        layers = [layer for layer in child.modules() if not isinstance(layer, nn.Sequential)]
        known = all(is_known_layer(x) if hasattr(x, "weight") else is_called_plainly(x) for x in layers)
        if not known or not is_called_plainly(child):
            raise RuntimeError(
                f"torch.jit.script: expected {name} of {type(module).__name__} to be plain, got one with hooks or with "
                "a class or tensors of its own, which a script leaves out (torch.jit.trace and torch.export do not)"
            )
