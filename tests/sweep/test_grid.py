"""Which candidates a grid means, and what it refuses."""

import json

import pytest

from loraport.errors import LoraportError
from loraport.sweep.grid import Grid, read_grid
from loraport.training.options import LoraOptions


def test_every_combination_with_a_name_of_its_own():
    grid = Grid(rank=(4, 8), alpha=("2r", 16), learning_rate=(1e-3, 3e-3))
    # At rank 8, "2r" is 16.
    with pytest.raises(LoraportError, match=r"r8-a16-lr0\.001: expected candidates that differ"):
        grid.trials(LoraOptions())
    trials = Grid(rank=(4, 8), alpha=("2r", 5), learning_rate=(1e-3, 3e-3)).trials(
        LoraOptions(use_rslora=True, seed=7)
    )
    assert [trial.name for trial in trials[:4]] == [
        "r4-a8-lr0.001",
        "r4-a8-lr0.003",
        "r4-a5-lr0.001",
        "r4-a5-lr0.003",
    ]
    assert {(t.lora.rank, t.lora.alpha, t.learning_rate) for t in trials} == {
        (r, a, lr) for r in (4, 8) for a in (2 * r, 5) for lr in (1e-3, 3e-3)
    }
    assert all(trial.lora.use_rslora and trial.lora.seed == 7 for trial in trials)


def test_names_tell_targets_and_layers_apart():
    grid = Grid(
        targets=("all-linear", ("q_proj", "v_proj"), r".*\.(q|v)_proj"), layers=("", "0-1,5")
    )
    assert [trial.name.split("-", 3)[3] for trial in grid.trials(LoraOptions())] == [
        "all-linear-layersall",
        "all-linear-layers0-1+5",
        "q_proj+v_proj-layersall",
        "q_proj+v_proj-layers0-1+5",
        "targets3-layersall",
        "targets3-layers0-1+5",
    ]
    assert Grid().trials(LoraOptions())[0].name == "r16-a32-lr0.001"


@pytest.mark.parametrize("form", ["toml", "json"])
def test_a_file(tmp_path, form):
    path = tmp_path / f"grid.{form}"
    path.write_text(
        'rank = [4, 8]\nalpha = "2r"\ntargets = ["all-linear", ["q_proj", "v_proj"]]\n'
        "learning_rate = 1e-3\n"
        if form == "toml"
        else json.dumps(
            {
                "rank": [4, 8],
                "alpha": "2r",
                "targets": ["all-linear", ["q_proj", "v_proj"]],
                "learning_rate": 1e-3,
            }
        )
    )
    assert Grid(**read_grid(path)) == Grid(
        rank=(4, 8), targets=("all-linear", ("q_proj", "v_proj")), learning_rate=(1e-3,)
    )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"rank": ()}, "rank: expected at least one value, got none"),
        ({"rank": (4, 4)}, "rank: expected each value once, got 4, 4"),
        ({"rank": (4.5,)}, "rank: expected a whole number, got 4.5"),
        ({"rank": (0,)}, "rank: expected at least 1, got 0"),
        ({"alpha": ("two",)}, "alpha: expected a number, or one times the rank like 2r"),
        ({"alpha": (0,)}, "alpha: expected a finite number other than 0"),
        ({"learning_rate": (-1.0,)}, "learning_rate: expected a finite number above 0, got -1.0"),
        ({"learning_rate": ("x",)}, "learning_rate: expected a number, got 'x'"),
        ({"rank": tuple(range(1, 300))}, "expected at most 256 candidates, got 299"),
    ],
)
def test_nonsense_is_refused(values, reason):
    with pytest.raises(LoraportError) as caught:
        Grid(**values).trials(LoraOptions())
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "expected TOML or JSON"),
        ("[]", "expected some of rank, alpha, targets, layers, learning_rate"),
        ('{"ranks": [4], "layers": [3]}', "ranks: expected one of rank"),
        ('{"ranks": [4], "layers": [3]}', "layers: expected texts"),
        ('{"targets": [[]]}', "targets: expected a text or a list of module names"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, reason):
    path = tmp_path / "grid.json"
    path.write_text(text)
    with pytest.raises(LoraportError) as caught:
        read_grid(path)
    assert reason in str(caught.value)
