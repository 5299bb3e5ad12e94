"""What takes an adapter refuses what is none, before anything is done."""

from pathlib import Path

import pytest
from torch import nn

from converters.formats.registry import write_adapter
from converters.onnx import add_adapters, pack
from loraport.adapter import Adapter
from loraport.bundle.slots import SlotTable
from loraport.errors import LoraportError
from loraport.evaluation import evaluate
from loraport.parity import verify_bundle
from loraport.peft_layout.write import write_peft
from loraport.training import load_into

MODEL = nn.Sequential(nn.Linear(3, 2))
ONE = {
    "load_into": lambda given: load_into(MODEL, given),
    "write_peft": lambda given: write_peft(given, "nowhere"),
    "write_adapter": lambda given: write_adapter(given, "nowhere", "mlx"),
    "pack": lambda given: pack(given, SlotTable(()), {}),
}
SEVERAL = {
    "add_adapters": lambda given: add_adapters("nowhere", given),
    "verify_bundle": lambda given: verify_bundle("nowhere", MODEL, given),
    "evaluate": lambda given: evaluate(MODEL, None, given, [None]),
}


@pytest.mark.parametrize("call", ONE)
@pytest.mark.parametrize(
    ("given", "got"),
    [("captain", "'captain'"), (Path("captain"), "'captain'"), (None, "NoneType"), ({}, "dict")],
)
def test_what_is_no_adapter_is_refused(call, given, got):
    told = f"^the adapter: expected an Adapter, got {got}; read one with .*read_adapter$"
    with pytest.raises(LoraportError, match=told):
        ONE[call](given)


@pytest.mark.parametrize("call", SEVERAL)
def test_one_of_several_is_named(call):
    with pytest.raises(LoraportError, match=r"^adapter 'b': expected an Adapter, got 'captain'"):
        SEVERAL[call]({"a": Adapter({}), "b": "captain"})
    with pytest.raises(LoraportError, match=r"^adapters: expected a mapping .* got list$"):
        SEVERAL[call]([Adapter({})])
