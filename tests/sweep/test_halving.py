"""Sweeps that give up the worse half: the same as deciding by hand on whole trainings."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from loraport.cli.sweep import sweep
from loraport.errors import LoraportError
from loraport.peft_layout import read_peft
from loraport.sweep.halving import worse_half
from loraport.sweep.trial import Outcome
from loraport.sweep.worker import Worker

GRID = ("--rank", "2,4,8", "--lr", "1e-3,1e-2,3e-2", "--steps", 16, "--device", "cpu")
GRID += ("--max-length", 32, "--keep-all", "--json")


def reached(name, *losses, steps=8):
    return Outcome(name, validations=((0, 9.0), *enumerate(losses, 1)), steps=steps)


def test_the_worse_half():
    there = [reached("a", 3.0, 1.0), reached("b", 2.0, 2.5), reached("c", 4.0, 0.5)]
    there += [reached("d", 2.0, 3.0), reached("e", 1.0)]  # ended by itself
    assert worse_half(there, 0.25) == {
        "b": "step 2: its validation loss 2.0000 was number 3 of 4",
        "d": "step 2: its validation loss 2.0000 was number 4 of 4",
    }
    # The lowest until then, and nothing later.
    assert list(worse_half(there, 0.125)) == ["a", "c"]
    assert list(worse_half(there[:3], 0.25)) == ["b"]
    assert worse_half(there[:1], 0.25) == {}
    assert worse_half([], 0.25) == {}
    given_up = [replace(each, ended="step 2", paused=False) for each in there]
    assert worse_half(given_up, 0.25) == worse_half(there, 0.25)


def run(*arguments):
    result = CliRunner().invoke(sweep, [str(each) for each in arguments])
    if result.exception:
        raise result.exception
    return {line["name"]: line for line in json.loads(result.stdout)["candidates"]}


def by_hand(whole, halvings):
    """Name → the step after which it is given up, of candidates validated after every step."""
    left, ends = list(whole), {}
    for power in range(halvings, 0, -1):
        step = 16 // 2**power
        best = {name: min(loss for at, loss in whole[name] if 0 < at <= step) for name in left}
        order = sorted(left, key=best.get)
        left = order[: -(-len(order) // 2)]
        ends |= dict.fromkeys(order[len(left) :], step)
    return ends


@pytest.mark.parametrize("together", [16, 4, 1])
def test_given_up_as_by_hand_and_the_rest_as_without(
    tiny_base, data, tmp_path, monkeypatch, together
):
    whole, taken = {}, {}
    real = Worker.train

    def train(self, trials, *more):
        found = real(self, trials, *more)
        taken.update({each.trial.name: each.outcome.step for each in found})
        whole.update({each.trial.name: each.outcome.validations for each in found})
        return found

    monkeypatch.setattr(Worker, "train", train)
    few = (tiny_base, data, *GRID, "--together", together)
    true = run(*few, "-o", tmp_path / "true", "--validate-every", 1)
    assert set(taken.values()) == {16}
    ends = by_hand(dict(whole), 3)
    assert sorted(ends.values()) == [2, 2, 2, 2, 4, 4, 8]
    taken.clear()
    got = run(*few, "-o", tmp_path / "got", "--validate-every", 1, "--halving", 3)
    assert taken == {name: ends.get(name, 16) for name in true}
    assert sum(taken.values()) < 0.45 * 16 * len(true)
    for name, line in true.items():
        if name in ends:
            assert got[name]["ended"].startswith(f"step {ends[name]}: its validation loss")
            continue
        assert not got[name]["ended"]
        assert got[name]["validation_loss"] == pytest.approx(line["validation_loss"], rel=1e-4)
        mine, other = (read_peft(tmp_path / o / "candidates" / name) for o in ("got", "true"))
        for path, module in other.modules.items():
            for letter in ("lora_A", "lora_B"):
                one, two = getattr(mine.modules[path], letter), getattr(module, letter)
                assert one.sub(two).abs().le(1e-5 + 1e-3 * two.abs()).all(), name
    # Control: those given up early are not what they would have become.
    losses = {name: got[name]["validation_loss"] - true[name]["validation_loss"] for name in ends}
    assert max(losses.values()) > 1e-2
    assert (tmp_path / "got" / "quality.png").stat().st_size


class Killed(BaseException):
    """As `kill -9` leaves things: nothing is tidied up."""


def test_killed_anywhere_it_goes_on(tiny_base, data, tmp_path, monkeypatch):
    """Whichever file is the last to appear, the sweep ends with the same table."""
    from loraport.sweep import store

    few = (tiny_base, data, *GRID, "--together", 3, "--save-every", 3, "--halving", 2)
    true = run(*few, "-o", tmp_path / "true")
    real, written = store.Store.add, []

    def add(self, trained):
        for each in trained:
            if len(written) == limit:
                raise Killed
            real(self, [each])
            written.append(each.outcome)

    monkeypatch.setattr(store.Store, "add", add)
    out, limit, kills = tmp_path / "out", 0, 0
    while not out.exists():
        limit += 7
        try:
            got = run(*few, "-o", out, *(["--resume"] if kills else []))
        except Killed:
            kills += 1
    assert kills > 4
    # Far less is trained again than a sweep has.
    assert {outcome.step for outcome in written} >= {3, 4, 8, 16}
    assert got.keys() == true.keys()
    for name, line in true.items():
        assert got[name]["ended"] == line["ended"]
        assert got[name]["validation_loss"] == pytest.approx(line["validation_loss"], rel=1e-4)
        assert got[name]["taken"] == line["taken"]


def test_other_halving_is_another_sweep(tiny_base, data, tmp_path, monkeypatch):
    from loraport.sweep import store

    def stop(*_):
        raise Killed

    monkeypatch.setattr(store.Store, "give_up", stop)
    few = (tiny_base, data, "-o", tmp_path / "out", *GRID)
    with pytest.raises(Killed):
        run(*few, "--halving", 2)
    monkeypatch.undo()
    with pytest.raises(LoraportError, match="halving: expected 2, got 3"):
        run(*few, "--halving", 3, "--resume")
    assert run(*few, "--halving", 2, "--resume")


@pytest.mark.parametrize("value", [-1, 11])
def test_bad_values(tiny_base, data, tmp_path, value):
    with pytest.raises(LoraportError, match=f"halving: expected from 0 to 10, got {value}"):
        run(tiny_base, data, "-o", tmp_path / "out", "--halving", value)
    assert not Path(tmp_path / "out").exists()
