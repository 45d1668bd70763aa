"""The ELPV photographs of solar cells: is a cell defective? Real images that ship inside a package of PyPI.

The set is far from solved: cracks and dark spots are small and faint, and experts who labelled it were not always sure.

Source: Buerhop-Lutz et al. 2018, "A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence
Imagery"; Deitsch et al. 2019. The images' licence is CC BY-NC-SA 4.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

TEST_SHARE = 0.25
CLASSES = ("intact", "defective")


@dataclass(frozen=True)
class Cells:
    """Images [N, 1, size, size] in float32, between 0 and 1, and labels [N] in int64: 1 for a defective cell."""

    images: Tensor
    labels: Tensor

    def split(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return the indices of a training and of a test set, with the same share of defective cells in both."""
        generator = torch.Generator().manual_seed(seed)
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for label in range(len(CLASSES)):
            indices = (self.labels == label).nonzero().flatten()
            indices = indices[torch.randperm(len(indices), generator=generator)]
            test_count = round(TEST_SHARE * len(indices))
            parts[0].append(indices[test_count:])
            parts[1].append(indices[:test_count])
        return torch.cat(parts[0]), torch.cat(parts[1])


def load(size: int) -> Cells:
    """Return all cells, made smaller to size x size pixels. Defective is what the experts gave more than one half."""
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError as error:
        raise SystemExit("this example needs the package elpv-dataset: pip install elpv-dataset") from error
    photographs, probabilities, _ = load_dataset()
    images = functional.interpolate(
        torch.from_numpy(photographs)[:, None].float() / 255, size=(size, size), mode="area"
    )
    return Cells(images, torch.from_numpy(probabilities > 0.5).long())


def batches(indices: Tensor, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Return the indices in batches, in an order that (seed, epoch) alone decides."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return indices[torch.randperm(len(indices), generator=generator)].split(batch_size)


def flipped(images: Tensor, seed: int, epoch: int, step: int) -> Tensor:
    """Return the images, each flipped at random: a cell upside down is as defective as before."""
    generator = torch.Generator().manual_seed((1_000_003 * seed + epoch) * 1_009 + step)
    for dim in (2, 3):
        chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(chosen, images.flip(dim), images)
    return images
