"""Training for long gives the same bits again, to the last step: weights, running statistics, momenta and losses."""

from __future__ import annotations

import hashlib

import pytest
import torch
from helpers import bits
from strategies import IS_LONG
from torch import nn

from se_ext.models import BasicBlock, SEResNet

pytestmark = pytest.mark.cpu_only
STEPS = 1000 if IS_LONG else 15
THREADS = (1, 2, 4)


def digest_of_training(compiled: bool, threads: int) -> str:
    """Of an SE-ResNet with one residual block per stage, on random images."""
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    model: nn.Module = SEResNet(BasicBlock, (1, 1, 1, 1), num_classes=3, drop_path_rate=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    forward = torch.compile(model) if compiled else model
    whole = hashlib.sha256()
    for _ in range(STEPS):
        images, labels = torch.randn(4, 3, 16, 16), torch.randint(3, (4,))
        loss = nn.functional.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        whole.update(bits(loss).numpy().tobytes())
    for t in model.state_dict().values():
        whole.update(bits(t).numpy().tobytes())
    assert loss.isfinite()
    return whole.hexdigest()


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_same_bits_after_many_steps(compiled: bool, threads: int, restore_threads: None) -> None:
    if compiled and threads != 2 and not IS_LONG:
        pytest.skip("takes minutes; SE_EXT_ROBUST=2 runs it")
    assert digest_of_training(compiled, threads) == digest_of_training(compiled, threads)
