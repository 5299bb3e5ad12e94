"""What a GPU would be waited for: operations whose result the host needs at once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loraport.sweep.loss import grouped_language_model_loss
from loraport.sweep.observer import SilentSweep
from loraport.sweep.together import train_together
from loraport.sweep.trial import Trial
from loraport.training import LoopOptions, LoraOptions, LossSum, attach, train
from loraport.training.data.batches import Row, collate
from loraport.training.data.end_to_end import lay_end_to_end
from loraport.training.losses.language_model import language_model_loss
from loraport.training.run.observer import Silent

# Shapes or numbers that depend on what is in a tensor.
WAITED_FOR = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero"}
WAITED_FOR |= {"aten.bincount", "aten.repeat_interleave", "aten._unique2"}


def by_mask(name, arguments):
    """An index that is a mask is counted first."""
    if name not in ("aten.index", "aten.index_put", "aten.index_put_"):
        return False
    return any(each is not None and each.dtype is torch.bool for each in arguments[1])


class Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        if name in WAITED_FOR or by_mask(name, args):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class AfterTheFirst(Silent, SilentSweep):
    """What is measured once, and told in the first step, is no matter."""

    def __init__(self, waits):
        self.waits = waits

    def stepped(self, *, step, **_):
        if step == 1:
            self.waits.seen.clear()


def row(length):
    tokens = tuple(range(1, length))
    return Row(tokens, (-100, -100, *tokens[2:]))


# Given no mask, transformers looks whether positions begin anew.
LAYOUTS = [(lambda rows, pad: lay_end_to_end([rows], pad), 0), (collate, 1)]


@pytest.mark.parametrize(("layout", "theirs"), LAYOUTS)
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


@pytest.mark.parametrize(("layout", "theirs"), LAYOUTS)
def test_a_step_of_several_candidates_is_waited_for_once_too(llama, layout, theirs):
    batch = layout([row(9), row(13), row(6)], 0).to(torch.device("cpu"))
    trials = [Trial(str(rank), LoraOptions(rank=rank), 1e-3) for rank in (2, 4)]

    def run(loss):
        with Waits() as waits:
            options = LoopOptions(steps=3, accumulate=2, device="cpu")
            train_together(llama, trials, [batch] * 6, loss, options, observer=AfterTheFirst(waits))
        return waits.seen

    batches = 2 * 2
    assert run(grouped_language_model_loss) == ["aten._local_scalar_dense"] * theirs * batches

    def picked(model, batch, count):  # the control
        part = grouped_language_model_loss(model, batch, count)
        assert (part.totals[part.totals > 0] > 0).all()
        return part

    seen = run(picked)
    assert seen.count("aten.index") == batches
    assert len(seen) == (theirs + 2) * batches
