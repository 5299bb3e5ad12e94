"""Candidates that pause and go on, in other company, against those that never paused."""

from dataclasses import replace

import pytest
import torch

from loraport.errors import LoraportError
from loraport.sweep.loss import grouped_language_model_loss
from loraport.sweep.together import train_together
from loraport.sweep.trial import Trial
from loraport.training import LoopOptions, LoraOptions
from loraport.training.data.batches import RowBatches
from loraport.training.run.checkpoints import load_state, save_state

SOME = ("q_proj", "v_proj", "down_proj")
TRIALS = (
    Trial("a", LoraOptions(rank=2, seed=1), 3e-3),
    Trial("b", LoraOptions(rank=4, targets=SOME, alpha=3.0, seed=2), 1e-2),
    Trial("c", LoraOptions(rank=4, use_rslora=True, seed=3), 2e-2),
    Trial("dora", LoraOptions(rank=2, use_dora=True), 1e-2),
    Trial("pissa", LoraOptions(rank=2, init="pissa", targets=SOME), 1e-2),
)
# 4 batches an epoch: pauses are within an epoch, and where one ends.
OPTIONS = LoopOptions(epochs=4, weight_decay=0.01, clip=0.5, lora_plus_ratio=2.0, device="cpu")


@pytest.fixture
def run(make_llama, rows):
    def run(trials, options=OPTIONS, **more):
        model = make_llama().double()
        training, validation = RowBatches(rows[:10], 3, 0, 5), RowBatches(rows[10:], 3, 0, None)
        loss = grouped_language_model_loss
        return train_together(model, trials, training, loss, options, validation=validation, **more)

    return run


def stored(outcome, directory):
    """An outcome whose state was on disk."""
    directory.mkdir()
    save_state(directory, outcome.state)
    return replace(outcome, state=load_state(directory))


def require_same(got, true, rel=0.0, atol=0.0):
    assert not got.paused
    assert got.state is None
    for mine, other in zip(got.losses, true.losses, strict=True):
        assert mine == pytest.approx(other, rel=rel, abs=0)
    # A pause is a validation more.
    there = dict(got.validations)
    for step, loss in true.validations:
        assert there[step] == pytest.approx(loss, rel=rel, abs=0)
    assert got.modules.keys() == true.modules.keys()
    for path, module in true.modules.items():
        for name in ("lora_A", "lora_B", "magnitude"):
            mine, other = getattr(got.modules[path], name), getattr(module, name)
            assert (mine is None) == (other is None)
            if other is not None:
                torch.testing.assert_close(mine, other, rtol=rel, atol=atol)


@pytest.mark.parametrize(
    "trial",
    [*TRIALS, Trial("dropped", LoraOptions(rank=3, dropout=0.4), 1e-2)],
    ids=lambda trial: trial.name,
)
@pytest.mark.parametrize("more", [{}, {"accumulate": 3, "validate_every": 2}], ids=["", "parts"])
def test_a_candidate_goes_on_bit_for_bit(run, trial, more, tmp_path):
    options = replace(OPTIONS, **more)
    true = run([trial], options)[trial.name]
    outcome, starts = None, {}
    for share in (0.25, 0.5, 0.8, 1.0):
        outcome = run([trial], options, until=share, starts=starts)[trial.name]
        if share < 1:
            assert outcome.paused
            assert outcome.step < outcome.steps == len(true.losses)
            assert outcome.validations[-1][0] == outcome.step
            starts = {trial.name: stored(outcome, tmp_path / str(share))}
    require_same(outcome, true)
    # Control: without the optimizer's state it learns something else.
    start = starts[trial.name]
    spoiled = replace(start, state=replace(start.state, optimizer={}, best={}))
    other = run([trial], replace(options, early_stopping=99), starts={trial.name: spoiled})
    path, module = next(iter(other[trial.name].modules.items()))
    assert not torch.equal(module.lora_B, outcome.modules[path].lora_B)


def test_candidates_go_on_in_other_company(run, tmp_path):
    """Two groups pause; of each some go on together. Only the order of sums differs."""
    true = run(TRIALS)
    paused = run(TRIALS[:2], until=0.3) | run(TRIALS[2:], until=0.3)
    left = (TRIALS[4], TRIALS[1], TRIALS[3])
    starts = {trial.name: stored(paused[trial.name], tmp_path / trial.name) for trial in left}
    got = run(left, starts=starts)
    assert list(got) == ["pissa", "b", "dora"]
    for name, outcome in got.items():
        require_same(outcome, true[name], rel=1e-7, atol=1e-9)
    # Control: what was learned before the pause counts.
    anew = run(left[:1], until=0.3)["pissa"]
    assert (
        anew.modules["model.layers.0.self_attn.q_proj"]
        .lora_B.ne(got["pissa"].modules["model.layers.0.self_attn.q_proj"].lora_B)
        .any()
    )


def test_what_is_kept_on_the_way_goes_on(run, tmp_path):
    """Nothing a candidate learns depends on whether it is kept; those that ended stay so."""
    kept = []
    options = replace(OPTIONS, save_every=3)
    fails = Trial("fails", LoraOptions(rank=2, seed=4), 1e30)
    true = run([*TRIALS[:2], fails], replace(options, clip=0.0))
    got = run([*TRIALS[:2], fails], replace(options, clip=0.0), keep=kept.append)
    assert [outcomes["a"].step for outcomes in kept] == [3, 6, 9, 12, 15]
    for name, outcome in got.items():
        assert outcome.failed is (name == "fails")
        assert outcome.losses == true[name].losses
    for number, outcomes in enumerate(kept):
        assert outcomes["fails"].failed
        assert not outcomes["fails"].paused
        starts = {name: stored(outcomes[name], tmp_path / f"{number}{name}") for name in ("a", "b")}
        after = run(TRIALS[:2], replace(options, clip=0.0), starts=starts)
        for name, outcome in after.items():
            require_same(outcome, true[name])


def test_candidates_after_other_steps_are_no_company(run):
    starts = run(TRIALS[:1], until=0.2) | run(TRIALS[1:2], until=0.4)
    for few in (starts, {"a": starts["a"]}):
        with pytest.raises(LoraportError, match="all to go on after the same step"):
            run(TRIALS[:2], starts=few)
