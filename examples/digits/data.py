"""Scikit-learn's handwritten digits: real 8x8 images that ship with the package, so nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

TEST_SHARE = 0.2
SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] in float32 (training set: mean 0, standard deviation 1), labels [N] in int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load() -> Digits:
    """Return the digits in one fixed, stratified split that every seed shares."""
    images, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        images.reshape(-1, 1, 8, 8), labels, test_size=TEST_SHARE, random_state=SPLIT_SEED, stratify=labels
    )
    mean, std = x_train.mean(), x_train.std()
    return Digits(
        torch.tensor((x_train - mean) / std, dtype=torch.float32),
        torch.tensor(y_train),
        torch.tensor((x_test - mean) / std, dtype=torch.float32),
        torch.tensor(y_test),
    )


def batches(sample_count: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Return index tensors covering 0..sample_count-1 once, in an order that (seed, epoch) alone decides."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(sample_count, generator=generator).split(batch_size)
