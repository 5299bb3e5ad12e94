"""The one-standard-error rule, and what counts as one measurement in it."""

import statistics
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from loraport.errors import LoraportError
from loraport.sweep.choose import choose
from loraport.sweep.loss import grouped_language_model_loss
from loraport.sweep.trial import Outcome
from loraport.sweep.validation import row_losses
from loraport.training.data.batches import RowBatches
from loraport.training.data.packing import make_batches
from loraport.training.devices import choose_placement

LINES = (4, 4, 4, 1, 1, 2, 2, 2, 2, 9, 9, 9, 7, 7)  # chats of several rows each


def measured(model, rows, packing):
    if packing is None:
        batches = RowBatches(rows, 4, 0, None)
    else:
        batches = make_batches(model, rows, 4, 0, None, packing=packing, max_length=48)
    placement = choose_placement("cpu", "float32")
    (losses,), weights = row_losses(model, batches, grouped_language_model_loss, placement, 1)
    return losses, weights


@pytest.mark.parametrize("packing", [None, "auto", "fill"])
def test_the_rows_of_a_chat_are_measured_as_one(make_llama, rows, packing):
    model = make_llama().double()
    chats = [replace(row, line=line) for row, line in zip(rows, LINES, strict=True)]
    expected = dict.fromkeys(LINES, 0.0)
    counts = dict.fromkeys(LINES, 0)
    for row in chats:
        tokens, labels = torch.tensor([row.tokens]), torch.tensor(row.labels)
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, :-1]
        expected[row.line] += float(F.cross_entropy(logits, labels[1:], reduction="sum"))
        counts[row.line] += int((labels[1:] != -100).sum())
    losses, weights = measured(model, chats, packing)
    # The head's loss is computed in float32.
    assert sorted(losses) == pytest.approx(sorted(expected.values()), rel=1e-6)
    pairs = zip(losses, weights, strict=True)
    by_loss = sorted((loss, counts[line]) for line, loss in expected.items())
    assert [weight for _, weight in sorted(pairs)] == [count for _, count in by_loss]
    # Control: rows of no known line, or of one each, stay by themselves.
    assert len(measured(model, rows, packing)[0]) == len(rows)


def outcome(name, losses, weights):
    mean = sum(losses) / sum(weights)
    validations = ((0, 9.0), (5, mean))
    return Outcome(name, ((5, 1.0),), validations, (5, mean), tuple(losses), tuple(weights))


def test_the_smallest_within_one_standard_error_is_taken():
    """With rows of one weight the error is the textbook's: deviation of the gaps over root n."""
    best = [2.0, 4.0, 1.0, 3.0, 5.0]
    gaps = [0.5, -0.4, 0.3, -0.2, 0.1]
    near = [loss + gap for loss, gap in zip(best, gaps, strict=True)]
    far = [loss + 0.2 for loss in near]
    outcomes = [outcome(*each, [1] * 5) for each in (("far", far), ("best", best), ("near", near))]
    choice = choose(outcomes, {"far": 1, "near": 2, "best": 3})
    assert (choice.best, choice.taken) == ("best", "near")
    error = statistics.stdev(gaps) / 5**0.5
    for name, mean in (("near", 0.06), ("far", 0.26)):
        difference = choice.differences[name]
        assert difference.mean == pytest.approx(mean)
        assert difference.error == pytest.approx(error)
    assert 0.06 < error < 0.26


def test_candidates_that_were_measured_otherwise_are_refused():
    one, other = outcome("one", [1.0, 2.0], [1, 1]), outcome("other", [4.0], [2])
    with pytest.raises(LoraportError, match=r"candidate other: expected 2 measurements .* got 1"):
        choose([one, other], {"one": 1, "other": 1})
