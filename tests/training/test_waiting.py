"""What a GPU would be waited for: operations whose result the host needs at once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loraport.training import LoopOptions, LoraOptions, LossSum, attach, train
from loraport.training.batches import Row, collate
from loraport.training.end_to_end import lay_end_to_end
from loraport.training.language_model import language_model_loss
from loraport.training.observer import Silent

# Shapes or numbers that depend on what is in a tensor.
WAITED_FOR = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero"}


class Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        if name in WAITED_FOR:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class AfterTheFirst(Silent):
    """What is measured once, and told in the first step, is no matter."""

    def __init__(self, waits):
        self.waits = waits

    def stepped(self, *, step, **_):
        if step == 1:
            self.waits.seen.clear()


def row(length):
    tokens = tuple(range(1, length))
    return Row(tokens, (-100, -100, *tokens[2:]))


@pytest.mark.parametrize(
    ("layout", "theirs"),
    [
        (lambda rows, pad: lay_end_to_end([rows], pad), 0),
        (collate, 1),  # given no mask, transformers looks whether positions begin anew
    ],
)
def test_a_step_is_waited_for_once_at_its_end(llama, layout, theirs):
    """Loss and norm are read by one copy, which on a CPU is none."""
    batch = layout([row(9), row(13), row(6)], 0).to(torch.device("cpu"))  # counted here
    attach(llama, LoraOptions(rank=2))

    def run(loss):
        with Waits() as waits:
            options = LoopOptions(steps=3, accumulate=2, device="cpu")
            train(llama, [batch] * 6, loss, options, observer=AfterTheFirst(waits))
        return waits.seen

    batches = 2 * 2
    assert run(language_model_loss) == ["aten._local_scalar_dense"] * theirs * batches

    def shown(model, batch):  # the control
        part = language_model_loss(model, batch)
        part.total.item()
        return LossSum(*part)

    assert run(shown) == ["aten._local_scalar_dense"] * (theirs + 1) * batches
