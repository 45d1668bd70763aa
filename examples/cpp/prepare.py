"""Writes what the program classify reads: seresnet18 as TorchScript and as a package of AOTInductor.

python prepare.py PHOTOGRAPH FOLDER writes seresnet18.pt and seresnet18.pt2 into the folder, and logits.txt, the logits
of the photograph in Python. There are no trained weights: the network is random, but the same in each run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor, nn

import se_ext

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZED, CROPPED = 256, 224


def preprocess(photograph: Path) -> Tensor:
    """[1, 3, 224, 224]: the same as in photograph.cpp, which says what."""
    pixels = torch.from_numpy(numpy.array(Image.open(photograph).convert("RGB")))
    height, width, _ = pixels.shape
    shorter = min(height, width)
    size = [RESIZED * height // shorter, RESIZED * width // shorter]
    image = pixels.permute(2, 0, 1)[None].float().contiguous()
    image = nn.functional.interpolate(image, size, mode="bilinear", antialias=True)
    top, left = (size[0] - CROPPED) // 2, (size[1] - CROPPED) // 2
    image = image[:, :, top : top + CROPPED, left : left + CROPPED]
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    return ((image / 255 - mean) / deviation).contiguous()


def make_network() -> nn.Module:
    """seresnet18 in evaluation, as if trained: no batch norm is the identity or starts its block at zero."""
    torch.manual_seed(0)
    network = se_ext.models.seresnet18(num_classes=1000).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photograph", type=Path, help="a JPEG file")
    parser.add_argument("folder", type=Path, help="where to write")
    arguments = parser.parse_args()

    network = make_network()
    image = preprocess(arguments.photograph)
    with torch.no_grad():
        logits = network(image)[0]
        torch.jit.script(network).save(arguments.folder / "seresnet18.pt")
        exported = torch.export.export(network, (image,))
        torch._inductor.aoti_compile_and_package(exported, package_path=str(arguments.folder / "seresnet18.pt2"))
    (arguments.folder / "logits.txt").write_text("".join(f"{logit:.9g}\n" for logit in logits.tolist()))


if __name__ == "__main__":
    main()
