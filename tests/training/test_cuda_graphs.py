"""``--cuda-graphs``, up to CUDA itself: what is recorded, what is copied, where gradients go.

A recorder that runs again what it was given stands for a GPU's; the GPU's own is in ``tests/cuda``.
"""

from functools import partial

import pytest
import torch

from loraport.training import LoopOptions, LoraOptions, adapter_of, attach, train
from loraport.training.batches import IGNORED, Row
from loraport.training.cuda_graphs import RecordedPasses
from loraport.training.language_model import language_model_loss
from loraport.training.packing import make_batches


class Replays:
    """Counts recordings and replays."""

    def __init__(self):
        self.recorded, self.replayed = 0, 0

    def __call__(self, run):
        self.recorded += 1

        def replay():
            self.replayed += 1
            with torch.enable_grad():
                run()

        run()  # as in a recording: Python runs, though nothing is computed
        return replay


def rows(count, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        tokens = tuple(torch.randint(250, (6 + 5 * (index % 4),), generator=numbers).tolist())
        made.append(Row(tokens, (IGNORED,) * 3 + tokens[3:]))
    return made


def trained(model, lora, packing, loop, recorded=None, *, few=False):
    torch.manual_seed(0)
    attach(model, lora)
    batches = make_batches(
        model, rows(16), 4, 0, 0, packing=packing, max_length=64, few_lengths=few
    )
    hidden = None if recorded is None else RecordedPasses(model, recorded)
    result = train(model, batches, partial(language_model_loss, hidden=hidden), loop)
    return [loss for _, loss in result.losses], adapter_of(model)


@pytest.mark.parametrize("packing", ["auto", "fill", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [LoraOptions(rank=4), LoraOptions(rank=4, use_dora=True)])
def test_the_same_losses_and_matrices(llama, fresh, packing, dtype, lora):
    loop = LoopOptions(steps=10, accumulate=2, learning_rate=0.02, device="cpu", dtype=dtype)
    expected, mine = trained(llama, lora, packing, loop, few=True)
    replays = Replays()
    got, other = trained(fresh, lora, packing, loop, replays, few=True)
    assert got == expected
    assert replays.recorded >= 2
    assert replays.replayed > 2 * replays.recorded
    for path, module in mine.modules.items():
        assert torch.equal(module.lora_A, other.modules[path].lora_A)
        assert torch.equal(module.lora_B, other.modules[path].lora_B)
    assert expected[-1] < expected[0] - 0.05
