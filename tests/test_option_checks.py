"""What options and the calls that take them refuse: texts as switches, values of wrong types."""

import json
import re
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest
from torch import nn, zeros

from converters.compose import compose
from converters.extract import ExtractOptions, extract
from converters.merge import MergeOptions
from converters.onnx.exporting import ExportOptions, export_base, export_torch_module
from converters.onnx.importing import ImportOptions, import_model
from converters.onnx.slots.inserting import SlotOptions
from loraport.errors import LoraportError
from loraport.runtime import Runtime
from loraport.runtime.generation import Sampling
from loraport.sweep.grid import Grid
from loraport.sweep.options import Spread, SweepOptions
from loraport.training import (
    LoopOptions,
    LoraOptions,
    TrainOptions,
    adapter_of,
    attach,
    lora_layers,
    train,
    train_language_model,
)


def linear(dynamic, out="o"):
    """Export a linear layer with these dimensions."""
    export_torch_module(nn.Linear(3, 4), {"input": zeros(2, 3)}, out, dynamic=dynamic)


SUMMED = "adapters: expected a name, an adapter and a strength of each"
ADAPTERS = (("captain", 1.0),)
LISTED = 'a list of names, such as ("one", "other")'


@pytest.mark.parametrize(
    ("kind", "more", "names"),
    [
        (SlotOptions, {}, "strength per_row"),
        (SweepOptions, {}, "keep_all"),
        (ExportOptions, {}, "lm_head"),
        (ImportOptions, {}, "lm_head copy_data"),
        (MergeOptions, {"base": "b", "adapters": ADAPTERS}, "force ignore_fingerprint"),
    ],
)
def test_texts_are_no_switches(kind, more, names):
    for name in names.split():
        for value in (True, False):
            assert getattr(kind(**more, **{name: value}), name) is value
        for wrong in ("no", "false", None):
            told = f"  - {name}: expected True or False, got {wrong!r}$"
            with pytest.raises(LoraportError, match=told):
                kind(**more, **{name: wrong})


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: SlotOptions(variants=None), f"slots: expected {LISTED}, got None"),
        (lambda: SlotOptions("lora"), f"slots: expected {LISTED}, got 'lora'"),
        (lambda: SlotOptions((1,)), f"slots: expected {LISTED}, got (1,)"),
        (lambda: SlotOptions(per_row=np.ones(2)), "per_row: expected True or False, got [1.0, 1."),
        (
            lambda: ImportOptions(lm_head=np.ones(2)),
            "lm_head: expected True or False, got array([1., 1.])",
        ),
        (lambda: SlotOptions(replace="norm"), f"replace: expected {LISTED}, got 'norm'"),
        (lambda: SweepOptions(together="8"), "together: expected a whole number, at least 1, got"),
        (lambda: SweepOptions(halving=None), "halving: expected a whole number, got None"),
        (lambda: SweepOptions(grid={"rank": (1,)}), "grid: expected Grid, got {'rank': (1,)}"),
        (
            lambda: SweepOptions(train=LoraOptions()),
            "train: expected TrainOptions, got LoraOptions",
        ),
        (lambda: SweepOptions(spread="local"), "spread: expected Spread, got 'local'"),
        (lambda: Spread(2), "address: expected auto, local or a cluster's address, got 2"),
        (lambda: Spread(workers="2"), "workers: expected a whole number, at least 1, got '2'"),
        (lambda: TrainOptions(lora={"rank": 2}), "lora: expected LoraOptions, got {'rank': 2}"),
        (lambda: LoraOptions(layers=3), 'layers: expected numbers in a text, such as "0-3,8", got'),
        (lambda: Grid(rank=8), "rank: expected a list of values, such as (1, 2), got 8"),
        (lambda: Grid(targets="q_proj"), "targets: expected a list of values, such as (1, 2), got"),
        (lambda: ExportOptions(provider="tpu"), "provider: expected cpu or cuda, got 'tpu'"),
        (
            lambda: ExportOptions(provider=np.array(["cpu", "cuda"])),
            "provider: expected cpu or cuda, got array(['cpu', 'cuda']",
        ),
        (
            lambda: ExportOptions(np.array(["int8", "fp32"])),
            "precision: expected a text, such as \"int8\", got array(['int8', 'fp32']",
        ),
        (
            lambda: ImportOptions(precision=np.array(["int8", "fp32"])),
            "precision: expected a text, such as \"int8\", got array(['int8', 'fp32']",
        ),
        (lambda: ImportOptions(precision=8), 'precision: expected a text, such as "int8", got 8'),
        (lambda: ExportOptions(slots=("lora",)), "slots: expected SlotOptions, got ('lora',)"),
        (lambda: ImportOptions(inputs=[1]), "inputs: expected Mapping, got [1]"),
        (lambda: MergeOptions("b", 5), "adapters: expected a path and a strength of each, got 5"),
        (lambda: MergeOptions("b", ("ab",)), "adapters: expected a path and a strength of each"),
        (
            lambda: MergeOptions("b", (("a", "1"),)),
            "strength of a: expected a finite number, got '",
        ),
        (  # beyond what a float holds
            lambda: MergeOptions("b", (("a", 10**400),)),
            "strength of a: expected a finite number, got 1000",
        ),
        (lambda: LoopOptions(steps=10**400), "steps: expected at least 1, got 1000"),
        (lambda: Sampling(temperature=10**400), "temperature: expected a finite number, 0 or more"),
        (lambda: MergeOptions("b", ADAPTERS, threads="4"), "threads: expected a whole number"),
        (lambda: MergeOptions("b", ((None, 1.0),)), "adapters: expected a path and a strength of"),
        (lambda: MergeOptions(None, ADAPTERS), "base: expected a path, got None"),
        (lambda: MergeOptions("b", ADAPTERS, 5), "output: expected a path, got 5"),
        (
            lambda: MergeOptions("b", ADAPTERS, initial_adapter=5),
            "initial_adapter: expected a path, got 5",
        ),
        (lambda: linear({"inputs": {0: "n"}}), "inputs: expected an input (input), got none of"),
        (lambda: linear({"input": ["n"]}), 'input: expected names by dimension, such as {0: "bat'),
        (lambda: linear({"input": {2: "n"}}), "input: expected one of its 2 dimensions, got 2"),
        (lambda: linear({"input": {"0": "n"}}), "input: expected one of its 2 dimensions, got '0'"),
        (
            lambda: linear({"input": {0: "my-n"}}),
            "input: expected a name of letters, digits and _ for dimension 0, got 'my-n'",
        ),
        (lambda: Sampling(temperature="0.5"), "temperature: expected a finite number, 0 or more"),
        (lambda: Sampling(top_p=None), "top_p: expected more than 0, at most 1, got None"),
    ],
)
def test_values_of_wrong_types_are_told(make, told):
    with pytest.raises(LoraportError, match=re.escape(f"  - {told}")):
        make()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda: attach(nn.Linear(3, 4), {"rank": 2}),
            "options: expected LoraOptions, got {'rank'",
        ),
        (lambda: train(nn.Linear(3, 4), [], None, LoraOptions()), "options: expected LoopOptions"),
        (lambda: train_language_model("b", "d", "o", 5), "options: expected TrainOptions, got 5"),
        (lambda: import_model("m.onnx", "o", 5), "options: expected ImportOptions, got 5"),
        (lambda: export_base("b", "o", 5), "options: expected ExportOptions, got 5"),
        (
            lambda: export_torch_module(nn.Linear(3, 4), {"input": zeros(1, 3)}, "o", slots="lora"),
            "slots: expected SlotOptions, got 'lora'",
        ),
        (lambda: linear(5), "dynamic: expected, for each input, names by dimension, such as {0:"),
        (lambda: linear(None, None), "the output: expected a path, got None"),
        (lambda: import_model(None, "o"), "the model: expected a path, got None"),
        (lambda: import_model("m.onnx", None), "the output: expected a path, got None"),
        (lambda: export_base("b", None), "the output: expected a path, got None"),
        (lambda: Runtime(None), "the bundle: expected a path, got None"),
        (lambda: export_torch_module("m", {}, "o"), "the module: expected a torch.nn.Module, got"),
        (lambda: attach("m"), "the model: expected a torch.nn.Module, got str"),
        (lambda: adapter_of("m"), "the model: expected a torch.nn.Module, got str"),
        (lambda: lora_layers(5), "the model: expected a torch.nn.Module, got int"),
        (lambda: compose([]), "adapters: expected at least one, got none"),
        (lambda: compose(None), f"{SUMMED}, got None"),
        (lambda: compose({"a": 5}), f"{SUMMED}, got 'a'"),
        (lambda: compose([("a", 5)]), f"{SUMMED}, got ('a', 5)"),
        (lambda: compose([("a", "captain", 1.0)]), "a: expected an Adapter, got 'captain'"),
        (lambda: extract(ExtractOptions("a", "b", "8"), print), "--rank: expected a whole number"),
        (lambda: extract(ExtractOptions("a", "b", 0), print), "--rank: expected a whole number"),
        (
            lambda: extract(ExtractOptions("a", "b", energy="1"), print),
            "--energy: expected a share",
        ),
    ],
)
def test_calls_refuse_what_is_of_another_class(call, told):
    with pytest.raises(LoraportError, match=re.escape(told)):
        call()


def test_values_that_are_meant_are_taken():
    assert SlotOptions(["lora", "gain"], replace=["norm"]).variants == ["lora", "gain"]
    taken = SlotOptions(np.array(["lora", "gain"]), replace={"norm"})
    assert taken == SlotOptions(["lora", "gain"], replace=("norm",))
    assert ImportOptions(precision="fp32") == ImportOptions()
    trials = Grid(targets=(["q_proj"], ["v_proj"])).trials(LoraOptions())
    assert [trial.lora.targets for trial in trials] == [["q_proj"], ["v_proj"]]
    attach(model := nn.Sequential(nn.Linear(3, 4)), LoraOptions(rank=2))
    assert lora_layers(model)["0"].rank == 2
    assert LoopOptions() == TrainOptions().loop


def test_values_that_json_has_not_are_stored_as_it_has_them():
    """Runs write their options down; of NumPy's numbers and sets none began to train."""
    lora = LoraOptions(
        rank=np.int64(2),
        alpha=Fraction(1, 2),
        dropout=np.float32(0.5),
        use_dora=np.True_,
        rank_pattern={"v_proj": np.int32(8)},
        targets={"v_proj", "q_proj"},
        exclude=dict.fromkeys(["k_proj"]).keys(),
        seed=np.uint64(3),
    )
    loop = LoopOptions(steps=np.int64(5), learning_rate=np.float32(0.25), shard_base=np.False_)
    given = TrainOptions(lora, loop, batch_size=np.int16(2), cuda_graphs=np.False_)
    plain = TrainOptions(
        LoraOptions(
            rank=2,
            alpha=0.5,
            dropout=0.5,
            use_dora=True,
            rank_pattern={"v_proj": 8},
            targets=("q_proj", "v_proj"),
            exclude=("k_proj",),
            seed=3,
        ),
        LoopOptions(steps=5, learning_rate=0.25),
        batch_size=2,
        cuda_graphs=False,
    )
    assert json.dumps(asdict(given)) == json.dumps(asdict(plain))
    for wrong in (np.int64(2), {"q_proj"}):  # control
        with pytest.raises(TypeError):
            json.dumps(wrong)
    for wrong in (np.array([1, 2]), np.int64, object()):
        with pytest.raises(LoraportError, match="rank: expected a whole number, at least 1, got "):
            LoraOptions(rank=wrong)
        with pytest.raises(LoraportError, match="use_dora: expected True or False, got "):
            LoraOptions(use_dora=wrong)


def test_a_grid_takes_any_list_of_values():
    grid = Grid(rank=range(2, 9, 3), alpha={8, "2r"}, learning_rate=np.array([0.5, 0.25]))
    assert grid == Grid(rank=(2, 5, 8), alpha=("2r", 8), learning_rate=[0.5, 0.25])
    assert Grid(rank=(np.int64(2),)) == Grid(rank=(2,))
    assert json.loads(json.dumps(asdict(SweepOptions(grid, halving=np.int64(1)))))["halving"] == 1
