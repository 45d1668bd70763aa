"""SE-ResNet and SE-ResNeXt, with the tail of every residual block (batch norm, SE block, shortcut, ReLU) as one op, and
every other batch norm as one with the ReLU behind it.

A batch norm, ReLU or SE block with hooks or a class of its own is called (see _known.py); what is around it stays
fused. `se` may be replaced by any module, or by None. In a program that is recorded for inference (torch.compile
without gradients, torch.export, torch.jit.trace) the batch norms are left as they are, for the compiler to fold into
the convolutions. A script, which can be trained, leaves all but those in front of the SE blocks.

The networks, the names of their parameters and the initialisation are those of timm's models of the same names, so that
their checkpoints load as they are; and so are the methods and attributes, so that code for timm's models runs as it is.
"""

# Annotations are evaluated here (no `from __future__ import annotations`): torch.fx writes those of a traced network's
# forward into its code, and torch.save cannot write strings there.
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._fusion import batch_norm
from ._residual import BasicBlock, Bottleneck, Projection

__all__ = [
    "SEResNet",
    "seresnet18",
    "seresnet34",
    "seresnet50",
    "seresnet101",
    "seresnet152",
    "seresnext50_32x4d",
    "seresnext101_32x4d",
]

STAGES = ("layer1", "layer2", "layer3", "layer4")
POOL_TYPES = ("", "avg", "max", "avgmax", "catavgmax")


class GlobalPool(nn.Module):
    """[N, C, H, W] → [N, C]: the mean, the maximum or half the sum of both; [N, 2 C] both, one behind the other
    (catavgmax). Without a type the map stays as it is. Types and interface are those of timm's SelectAdaptivePool2d."""

    def __init__(self, pool_type: str) -> None:
        super().__init__()
        if pool_type not in POOL_TYPES:
            raise ValueError(f"expected global_pool to be one of {POOL_TYPES}, got {pool_type!r}")
        self.pool_type = pool_type

    def is_identity(self) -> bool:
        return self.pool_type == ""

    def feat_mult(self) -> int:
        """Pooled features per channel."""
        return 2 if self.pool_type == "catavgmax" else 1

    def forward(self, x: Tensor) -> Tensor:
        if self.pool_type == "":
            return x
        if self.pool_type == "avg":
            return x.mean((2, 3))
        if self.pool_type == "max":
            return x.amax((2, 3))
        if self.pool_type == "avgmax":
            return 0.5 * x.mean((2, 3)) + 0.5 * x.amax((2, 3))
        return torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1)

    def extra_repr(self) -> str:
        return f"pool_type={self.pool_type!r}"


def absolute_indices(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """The given ones of `count` intermediate maps (negative: from the end), the last n of them for an int n, all for
    None."""
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise ValueError(f"expected indices, the number of last maps, from 1 to {count}, got {indices}")
        return list(range(count - indices, count))
    for index in indices:
        if not -count <= index < count:
            raise ValueError(f"expected indices from {-count} to {count - 1}, got {index}")
    return [index % count for index in indices]


class SEResNet(nn.Module):
    r"""A residual network with Squeeze-and-Excitation in every residual block.

    Args:
        block: the residual block, BasicBlock or Bottleneck.
        layers: residual blocks per stage; the stages are 64, 128, 256 and 512 planes wide.
        num_classes: of the classifier `fc`; 0 for none, the network then gives the pooled features.
        in_chans: channels of the images.
        global_pool: "avg", "max", "avgmax" (half the sum of both), "catavgmax" (both, twice the features), or "" for
            none, the network then gives the map (with num_classes=0).
        reduction: C / M of the SE blocks; M is rounded to a multiple of 8.
        se_bias: whether the SE blocks' layers have biases (timm's have, the paper's have none).
        drop_rate: dropout in front of the classifier.
        drop_path_rate: stochastic depth; the last residual block's drop probability, the first one's being 0.
        zero_init_last: whether each residual block starts as its shortcut, its last batch norm at zero.
        block_options: groups and base_width of a Bottleneck.

    Shape:
        [N, in_chans, H, W] → logits [N, num_classes]

    Raises:
        ValueError: another global_pool.

    Source: Hu et al. 2017, "Squeeze-and-Excitation Networks", table 1; He et al. 2015; Xie et al. 2016 (ResNeXt); Huang
    et al. 2016 (stochastic depth).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        reduction: float = 16,
        se_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
        **block_options: Any,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        options = {"reduction": reduction, "se_bias": se_bias, **block_options}
        depth = sum(layers)
        drop_paths = iter([drop_path_rate * i / max(1, depth - 1) for i in range(depth)])
        width = block.expansion

        def stage(in_channels: int, planes: int, stride: int, count: int) -> nn.Sequential:
            downsample = None
            if stride != 1 or in_channels != planes * width:
                downsample = Projection(in_channels, planes * width, stride)
            first = block(in_channels, planes, stride, downsample, drop_path=next(drop_paths), **options)
            others = [
                block(planes * width, planes, 1, None, drop_path=next(drop_paths), **options) for _ in range(count - 1)
            ]
            return nn.Sequential(first, *others)

        self.layer1 = stage(64, 64, 1, layers[0])
        self.layer2 = stage(64 * width, 128, 2, layers[1])
        self.layer3 = stage(128 * width, 256, 2, layers[2])
        self.layer4 = stage(256 * width, 512, 2, layers[3])
        self.num_features = 512 * width
        self.feature_info = [dict[str, Any](num_chs=64, reduction=2, module="act1")]
        for i, name in enumerate(STAGES):
            self.feature_info.append({"num_chs": 64 * 2**i * width, "reduction": 4 * 2**i, "module": name})
        self.set_head(global_pool)
        self.init_weights(zero_init_last)

    def set_head(self, global_pool: str) -> None:
        """Pooling and a new classifier, where the network's parameters are and of their dtype."""
        self.global_pool = GlobalPool(global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        fc: nn.Module = nn.Identity()
        if self.num_classes > 0:
            like = next(self.parameters())
            fc = nn.Linear(self.head_hidden_size, self.num_classes, device=like.device, dtype=like.dtype)
        self.fc = fc

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Kaiming normal convolutions; each residual block starts as its shortcut, its last batch norm at zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_last and isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_(module.last_batch_norm().weight)

    def forward_stem(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] → [N, 64, H / 2, W / 2]"""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            modules: Any = self._modules
            return batch_norm(modules["bn1"], modules["act1"], self.conv1(x))
        return self.act1(self.bn1(self.conv1(x)))

    def forward_stage(self, name: str, x: Tensor) -> Tensor:
        """One of layer1 to layer4; with checkpointing on, each of its residual blocks by itself."""
        stage: Any = self._modules[name]
        if not self.grad_checkpointing:
            return stage(x)
        for block in stage:
            # Stopped early, the second run would move every running statistic but the last batch norm's.
            x = checkpoint(block, x, use_reentrant=False, early_stop=False)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] → [N, 512 · expansion, H / 32, W / 32]"""
        x = self.maxpool(self.forward_stem(x))
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            if self.grad_checkpointing:
                for name in STAGES:
                    x = self.forward_stage(name, x)
                return x
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What forward_features gives → logits [N, num_classes], or what the classifier would take."""
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    # ---- what code for timm's models calls ----

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps that feature_info lists.

        Args:
            x: [N, in_chans, H, W].
            indices: which maps: a sequence of indices, the last n for an int n, all for None.
            norm: without effect: the network has no norm behind its features.
            stop_early: end behind the last map wanted.
            output_fmt: "NCHW".
            intermediates_only: leave out the final map.

        Returns:
            The final map and the list of maps, in the network's order; or the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f'expected output_fmt "NCHW", got {output_fmt!r}')
        wanted = absolute_indices(indices, 1 + len(STAGES))
        x = self.forward_stem(x)
        maps = [x] if 0 in wanted else []
        x = self.maxpool(x)
        for index, name in enumerate(STAGES[: max(wanted)] if stop_early else STAGES, start=1):
            x = self.forward_stage(name, x)
            if index in wanted:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Takes out what stands behind the last of the maps at `indices`, and the head; returns the indices from 0."""
        wanted = absolute_indices(indices, 1 + len(STAGES))
        last = max(wanted)
        for name in STAGES[last:]:
            setattr(self, name, nn.Sequential())
        if last == 0:
            self.add_module("maxpool", nn.Identity())
        if last < len(STAGES):
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or last < len(STAGES):
            self.reset_classifier(0, "")
        return wanted

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def get_classifier(self, name_only: bool = False) -> Any:
        return "fc" if name_only else self.fc

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier (0 classes: none), and another pooling unless None."""
        self.num_classes = num_classes
        self.set_head(self.global_pool.pool_type if global_pool is None else global_pool)
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether a training step keeps only the inputs of the residual blocks and computes each of them again in
        backward. As in timm's networks, the running statistics of their batch norms then move twice in a step."""
        self.grad_checkpointing = enable

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of the parameters' names, for layer-wise learning rates: stem, blocks (or stages if coarse)."""
        return {"stem": r"^conv1|bn1|maxpool", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


def seresnet18(**options: Any) -> SEResNet:
    """SE-ResNet-18, timm's `seresnet18`. Options: those of SEResNet."""
    return SEResNet(BasicBlock, (2, 2, 2, 2), **options)


def seresnet34(**options: Any) -> SEResNet:
    """SE-ResNet-34, timm's `seresnet34`. Options: those of SEResNet."""
    return SEResNet(BasicBlock, (3, 4, 6, 3), **options)


def seresnet50(**options: Any) -> SEResNet:
    """SE-ResNet-50, timm's `seresnet50`. Options: those of SEResNet."""
    return SEResNet(Bottleneck, (3, 4, 6, 3), groups=1, base_width=64, **options)


def seresnet101(**options: Any) -> SEResNet:
    """SE-ResNet-101, timm's `seresnet101`. Options: those of SEResNet."""
    return SEResNet(Bottleneck, (3, 4, 23, 3), groups=1, base_width=64, **options)


def seresnet152(**options: Any) -> SEResNet:
    """SE-ResNet-152, timm's `seresnet152`. Options: those of SEResNet."""
    return SEResNet(Bottleneck, (3, 8, 36, 3), groups=1, base_width=64, **options)


def seresnext50_32x4d(**options: Any) -> SEResNet:
    """SE-ResNeXt-50 (32x4d), timm's `seresnext50_32x4d`. Options: those of SEResNet."""
    return SEResNet(Bottleneck, (3, 4, 6, 3), groups=32, base_width=4, **options)


def seresnext101_32x4d(**options: Any) -> SEResNet:
    """SE-ResNeXt-101 (32x4d), timm's `seresnext101_32x4d`. Options: those of SEResNet."""
    return SEResNet(Bottleneck, (3, 4, 23, 3), groups=32, base_width=4, **options)
