"""torchvision beside a CPU build of torch. The registry's torchvision has CUDA-built ops that can't load there, and its
import then fails at two operators that it registers fake kernels for; they are declared here first."""

import torch

_library = torch.library.Library("torchvision", "DEF")  # the operators live as long as it does
for _name in ("nms", "qnms"):
    if torch.version.cuda is None and not torch._C._dispatch_has_kernel(f"torchvision::{_name}"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision  # noqa: E402

__all__ = ["torchvision"]
