"""One operator with a slot, run with and without an adapter, against float64."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_graphs import session

from converters.onnx.importing import ImportOptions, slot_graph
from converters.onnx.slots.inserting import SlotOptions


@dataclass(frozen=True)
class Slotted:
    """A graph before and after it got slots."""

    original: onnx.ModelProto
    model: onnx.ModelProto
    slots: tuple
    unslotted: Mapping[str, str]

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        return session(self.model).run(None, inputs)

    def run_original(self, **inputs: np.ndarray) -> list[np.ndarray]:
        return session(self.original).run(None, inputs)


def slot_model(model: onnx.ModelProto, *variants: str, **controls: bool) -> Slotted:
    read = ir.from_proto(model)
    options = ImportOptions(slots=SlotOptions(variants or ("lora",), **controls))
    made = slot_graph(read, options).slotted
    result = ir.to_proto(made.model)
    onnx.checker.check_model(result, full_check=True)
    onnx.shape_inference.infer_shapes(result, check_type=True, strict_mode=True)
    before = {(entry.domain, entry.version) for entry in model.opset_import}
    assert {(entry.domain, entry.version) for entry in result.opset_import} == before
    return Slotted(model, result, made.slots.slots, made.unslotted)


@pytest.fixture
def slotted() -> Callable[..., Slotted]:
    return slot_model


def lora(slot, rank=3, seed=5, size=0.3):
    """Return an adapter's two inputs for one slot, far from zero."""
    random = np.random.default_rng(seed)
    shapes = {name: entry.shape for name, entry in slot.inputs.items()}
    found = {}
    for role in ("lora_A", "lora_B"):
        shape = [length if isinstance(length, int) else rank for length in shapes[role]]
        found[f"{slot.name}.{role}"] = (random.standard_normal(shape) * size).astype(np.float32)
    return found


@pytest.fixture
def adapter() -> Callable[..., dict[str, np.ndarray]]:
    return lora
