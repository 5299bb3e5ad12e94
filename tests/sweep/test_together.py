"""Candidates trained together against each trained alone by `train`."""

from dataclasses import replace

import pytest
import torch

from loraport.errors import LoraportError
from loraport.sweep.choose import choose
from loraport.sweep.loss import RowLosses, grouped_language_model_loss
from loraport.sweep.observer import SilentSweep
from loraport.sweep.together import train_together
from loraport.sweep.trial import Trial
from loraport.training import LoopOptions, LoraOptions, attach, lora_layers, train
from loraport.training.data.batches import IGNORED, Row, RowBatches, collate
from loraport.training.data.end_to_end import SegmentedBatch, lay_end_to_end
from loraport.training.data.packing import make_batches
from loraport.training.losses.language_model import language_model_loss

SOME = ("q_proj", "v_proj", "down_proj")
TRIALS = (
    Trial("a", LoraOptions(rank=2, seed=1), 3e-3),
    Trial("b", LoraOptions(rank=4, targets=SOME, alpha=3.0, seed=2), 1e-2),
    Trial("c", LoraOptions(rank=4, use_rslora=True, seed=3), 2e-2),
    Trial("d", LoraOptions(rank=4, seed=3), 5e-3),
    Trial("e", LoraOptions(rank=3, targets=("embed_tokens", "o_proj")), 3e-3),
)
# With the output head, whose hidden states are then not chunked.
WITH_HEAD = (
    Trial("f", LoraOptions(rank=2, targets=("lm_head", "v_proj")), 1e-2),
    Trial("g", LoraOptions(rank=2), 1e-2),
)
# Beyond two matrices: these go one candidate at a time, beside one that is plain.
VARIANTS = (
    Trial("h", LoraOptions(rank=2, use_dora=True), 1e-2),
    Trial("i", LoraOptions(rank=2, init="pissa", targets=SOME), 1e-2),
    Trial("j", LoraOptions(rank=3), 1e-2),
)
OPTIONS = LoopOptions(epochs=3, weight_decay=0.01, clip=0.5, lora_plus_ratio=2.0, device="cpu")


def batches(rows, seed=5):
    return RowBatches(rows[:10], 3, 0, seed), RowBatches(rows[10:], 3, 0, None)


def together(model, trials, rows, options=OPTIONS, loss=grouped_language_model_loss, **more):
    training, validation = batches(rows)
    return train_together(model, trials, training, loss, options, validation=validation, **more)


def alone(model, trial, rows, options=OPTIONS, made=None):
    """Losses, validations and the layers that `train` leaves."""
    training, validation = made or batches(rows)
    attach(model, trial.lora)
    result = train(
        model,
        training,
        language_model_loss,
        replace(options, learning_rate=trial.learning_rate),
        validation=validation,
    )
    return result, lora_layers(model)


def close(got, expected, rel):
    for (step, value), (at, other) in zip(got, expected, strict=True):
        assert step == at
        assert value == pytest.approx(other, rel=rel)


@pytest.mark.parametrize(
    ("trials", "options"),
    [
        (TRIALS, OPTIONS),
        (TRIALS, replace(OPTIONS, accumulate=2, clip=0.0, validate_every=2, steps=7)),
        (WITH_HEAD, replace(OPTIONS, epochs=2)),
        (VARIANTS, replace(OPTIONS, epochs=2)),
    ],
    ids=["clipped", "accumulated", "head", "variants"],
)
def test_each_candidate_equals_its_training_alone(make_llama, rows, trials, options):
    """In float64 only the order of summation differs: what remains is rounding."""
    # With early stopping, `train` too leaves the best.
    options = replace(options, early_stopping=99)
    outcomes = together(make_llama().double(), trials, rows, options)
    assert list(outcomes) == [trial.name for trial in trials]
    for trial in trials:
        result, layers = alone(make_llama().double(), trial, rows, options)
        outcome = outcomes[trial.name]
        close(outcome.losses, result.losses, 1e-10)
        close(outcome.validations, result.validations, 1e-10)
        assert outcome.best[0] == result.kept[0]
        assert outcome.ended == ""
        assert outcome.modules.keys() == layers.keys()
        for path, module in outcome.modules.items():
            layer = layers[path]
            lora_a, lora_b = (matrix.detach() for matrix in layer.matrices())
            torch.testing.assert_close(module.lora_A, lora_a, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(module.lora_B, lora_b, rtol=1e-7, atol=1e-9)
            assert module.lora_B.abs().max() > 1e-4
            assert module.scaling == layer.scaling
            if layer.magnitude is not None:
                torch.testing.assert_close(
                    module.magnitude, layer.magnitude.detach(), rtol=1e-7, atol=1e-9
                )
    # Control: the candidates differ, also where only scaling, seed or rate do.
    for index, one in enumerate(outcomes.values()):
        for other in list(outcomes.values())[:index]:
            assert abs(one.losses[-1][1] - other.losses[-1][1]) > 1e-4
            for path in one.modules.keys() & other.modules.keys():
                left, right = one.modules[path], other.modules[path]
                delta = (each.lora_B @ each.lora_A * each.scaling for each in (left, right))
                assert left.kind != "linear" or torch.sub(*delta).abs().max() > 1e-3


def test_rows_end_to_end_train_what_padded_rows_train(make_llama, rows):
    """Against each alone: the same batches, and padded ones that float32 norms round otherwise."""
    beginning = (9, 8, 7, 6)
    longer = tuple(
        Row(beginning + row.tokens, (IGNORED,) * len(beginning) + row.labels) for row in rows
    )
    options = replace(OPTIONS, early_stopping=99)

    def laid(model):
        return tuple(
            make_batches(model, part, 3, 0, seed, packing="auto", max_length=64)
            for part, seed in ((longer[:10], 5), (longer[10:], None))
        )

    model = make_llama().double()
    training, validation = laid(model)
    assert isinstance(next(iter(validation.epoch(0))), SegmentedBatch)
    outcomes = train_together(
        model, TRIALS, training, grouped_language_model_loss, options, validation=validation
    )
    padded = together(make_llama().double(), TRIALS, longer, options)
    for trial in TRIALS:
        model = make_llama().double()
        result, layers = alone(model, trial, longer, options, laid(model))
        outcome, other = outcomes[trial.name], padded[trial.name]
        close(outcome.losses, result.losses, 1e-10)
        close(outcome.validations, result.validations, 1e-10)
        close(outcome.losses, other.losses, 1e-6)
        assert outcome.row_weights == other.row_weights
        assert outcome.row_losses == pytest.approx(other.row_losses, rel=1e-6)
        assert len(set(outcome.row_losses)) == 4
        for path, module in outcome.modules.items():
            lora_a, lora_b = (matrix.detach() for matrix in layers[path].matrices())
            torch.testing.assert_close(module.lora_A, lora_a, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(module.lora_B, lora_b, rtol=1e-7, atol=1e-9)


def test_rows_of_several_sequences_keep_their_order(make_llama, rows):
    """Two sequences of two and three rows."""
    model = make_llama().double()
    batch = lay_end_to_end([rows[:2], rows[2:5]], 0)
    found = grouped_language_model_loss(model, batch, 2)
    expected = grouped_language_model_loss(model, collate(rows[:5], 0), 2)
    torch.testing.assert_close(found.totals, expected.totals, rtol=1e-10, atol=0)
    assert found.weights == expected.weights
    assert (found.totals[:, 1:] - found.totals[:, :-1]).abs().min() > 1e-3


def spoiled(row, at_call):
    """The loss, but NaN for one candidate from some call on."""
    calls = []

    def loss(model, batch, count):
        part = grouped_language_model_loss(model, batch, count)
        if not torch.is_grad_enabled():
            return part
        calls.append(1)
        if len(calls) < at_call or count < len(TRIALS):
            return part
        factor = torch.ones(count, 1)
        factor[row] = float("nan")
        return RowLosses(part.totals * factor, part.weights, part.tokens)

    return loss


@pytest.mark.parametrize(("patience", "failed"), [(2, False), (0, True)])
def test_a_validation_loss_that_is_not_finite_ends_one_as_train_would(
    make_llama, rows, patience, failed
):
    """Early stopping keeps the best there was, and others go on."""
    options = replace(OPTIONS, early_stopping=patience, validate_every=2, steps=8)
    of_all, batches_each = [], len(batches(rows)[1])

    def loss(model, batch, count):
        part = grouped_language_model_loss(model, batch, count)
        if torch.is_grad_enabled():
            return part
        of_all.append(count == len(TRIALS))
        factor = torch.ones(count, 1)
        if of_all[-1] and sum(of_all) > batches_each:  # after step 4
            factor[1] = float("nan")
        return RowLosses(part.totals * factor, part.weights, part.tokens)

    got = together(make_llama().double(), TRIALS, rows, options, loss=loss)
    spoiled_one, other = got["b"], got["a"]
    assert spoiled_one.ended == "step 4: its validation loss was nan"
    assert spoiled_one.failed == failed
    assert spoiled_one.best[0] == 2
    assert len(spoiled_one.losses) == 4
    assert not other.failed
    assert other.best[0] > 2


class Watch(SilentSweep):
    def __init__(self):
        self.endings = {}

    def ended(self, *, name, reason):
        self.endings[name] = reason


@pytest.mark.parametrize(("row", "at_call"), [(1, 1), (2, 6), (4, 9)])
def test_a_candidate_that_fails_is_dropped_and_harms_no_other(make_llama, rows, row, at_call):
    watch = Watch()
    whole = together(make_llama().double(), TRIALS, rows)
    got = together(make_llama().double(), TRIALS, rows, loss=spoiled(row, at_call), observer=watch)
    failed = TRIALS[row].name
    assert list(watch.endings) == [failed]
    assert watch.endings[failed] == f"step {at_call}: its loss was nan" == got[failed].ended
    assert got[failed].failed
    assert len(got[failed].losses) == at_call - 1
    # What was measured before it failed is kept.
    assert (got[failed].modules is None) == (at_call <= 4)
    for name in got.keys() - {failed}:
        assert not got[name].failed
        close(got[name].losses, whole[name].losses, 1e-5)
        for path, module in whole[name].modules.items():
            other = got[name].modules[path]
            torch.testing.assert_close(other.lora_B, module.lora_B, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("patience", "failed"), [(2, False), (0, True)])
def test_a_training_loss_that_is_not_finite_ends_one_as_train_would(
    make_llama, rows, patience, failed
):
    """Early stopping keeps the best there was, and the candidate can be taken."""
    options = replace(OPTIONS, early_stopping=patience, validate_every=2)
    got = together(make_llama().double(), TRIALS, rows, options, loss=spoiled(1, 6))
    assert got["b"].ended == "step 6: its loss was nan"
    assert got["b"].failed == failed
    assert got["b"].best[0] in (2, 4)
    assert [outcome.failed for name, outcome in got.items() if name != "b"] == [False] * 4
    sizes = dict.fromkeys(got, 1)
    assert ("b" in choose(list(got.values()), sizes).differences) is not failed


def test_a_candidate_that_fails_names_its_rows(make_llama, rows):
    numbered = [replace(row, line=100 + number) for number, row in enumerate(rows)]
    got = together(make_llama().double(), TRIALS, numbered, loss=spoiled(1, 2))
    (batch,) = list(RowBatches(numbered[:10], 3, 0, 5).epoch(0))[1:2]
    lines = ", ".join(map(str, sorted(batch.lines)))
    assert len(batch.lines) == 3
    assert got["b"].ended == f"step 2: its loss was nan in the batch of data lines {lines}"
    assert not got["a"].ended


def test_a_learning_rate_that_explodes_leaves_the_others_alone(make_llama, rows):
    trials = (TRIALS[0], replace(TRIALS[2], learning_rate=1e30), TRIALS[3])
    got = together(make_llama(), trials, rows, replace(OPTIONS, clip=0.0))
    assert [outcome.failed for outcome in got.values()] == [False, True, False]
    whole = together(make_llama(), (TRIALS[0], TRIALS[3]), rows, replace(OPTIONS, clip=0.0))
    for name, outcome in whole.items():
        close(got[name].validations, outcome.validations, 1e-4)


def test_each_candidate_stops_early_by_itself(make_llama, rows):
    """As `train` would stop it; the best adapter is kept, not the last."""
    options = replace(OPTIONS, epochs=12, early_stopping=1, validate_every=2)
    trials = tuple(
        replace(t, learning_rate=rate)
        for t, rate in zip(TRIALS[:3], (1e-4, 0.1, 0.02), strict=True)
    )
    got = together(make_llama().double(), trials, rows, options)
    lengths = {}
    for trial in trials:
        result, layers = alone(make_llama().double(), trial, rows, options)
        outcome = got[trial.name]
        assert len(outcome.losses) == result.steps
        assert outcome.best == pytest.approx(result.kept)
        lengths[trial.name] = result.steps
        for path, layer in layers.items():
            torch.testing.assert_close(
                outcome.modules[path].lora_B, layer.lora_B.detach(), rtol=1e-7, atol=1e-9
            )
        assert outcome.row_losses
        assert sum(outcome.row_losses) / sum(outcome.row_weights) == pytest.approx(outcome.best[1])
    assert len(set(lengths.values())) > 1
    assert max(lengths.values()) == 48
    ended = {name: bool(outcome.ended) for name, outcome in got.items()}
    assert ended == {name: steps < 48 for name, steps in lengths.items()}


def test_the_model_is_left_as_it_was(make_llama, rows):
    model = make_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    together(model, TRIALS, rows, replace(OPTIONS, steps=2))
    assert [type(module) for module in model.modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    attach(model, TRIALS[0].lora)


def test_a_layer_of_another_kind_trains_the_same(rows):
    """GPT-2's Conv1D layers go one candidate at a time."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2():
        torch.manual_seed(0)
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        settings = {"vocab_size": 64, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 32}
        return GPT2LMHeadModel(GPT2Config(**settings, **still)).double()

    trials = (TRIALS[0], replace(TRIALS[2], name="c"), replace(TRIALS[2], name="d"))
    trials = (trials[0], trials[1], replace(trials[2], learning_rate=1e-3))
    got = together(gpt2(), trials, rows)
    for trial in trials:
        result, layers = alone(gpt2(), trial, rows)
        close(got[trial.name].losses, result.losses, 1e-6)
        # Without early stopping `train` leaves the last, which here is also the best.
        assert got[trial.name].best[0] == result.validations[-1][0]
        for path, layer in layers.items():
            torch.testing.assert_close(
                got[trial.name].modules[path].lora_B, layer.lora_B.detach(), rtol=1e-7, atol=1e-9
            )


@pytest.mark.parametrize("mixes", ["in order", "shifted"])
def test_a_model_that_mixes_rows_is_refused(make_llama, rows, mixes):
    model = make_llama()

    def mix(_module, _inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        mixed = hidden + hidden.mean(0) if mixes == "in order" else hidden.roll(1, 0)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    model.model.layers[0].register_forward_hook(mix)
    with pytest.raises(LoraportError, match="one that mixes them"):
        together(model, TRIALS, rows)
    # One at a time it can be trained.
    together(model, TRIALS[:1], rows, replace(OPTIONS, steps=1))


def test_what_cannot_be_shared_is_refused(make_llama, rows):
    twice = (TRIALS[0], replace(TRIALS[1], name="a"))
    with pytest.raises(LoraportError, match="each with a name of its own"):
        together(make_llama(), twice, rows)
    dropped = replace(TRIALS[0], lora=LoraOptions(dropout=0.1))
    with pytest.raises(LoraportError, match="a: expected no dropout in company"):
        together(make_llama(), (dropped, TRIALS[1]), rows)
