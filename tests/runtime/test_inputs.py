"""What a run is given: every input of another kind is named; controls that say nothing are told."""

import numpy as np
import pytest

from loraport.errors import LoraportError
from loraport.runtime import Runtime
from loraport.runtime.decoder import first_step_inputs, read_decoder


@pytest.fixture(scope="module")
def runtime(bundle):
    return Runtime(bundle, threads=1)


@pytest.fixture
def inputs(runtime):
    return first_step_inputs(runtime, read_decoder(runtime.directory), [5, 60, 7])


def test_inputs_of_another_type_are_all_named(runtime, inputs):
    narrow = {name: inputs[name].astype(np.int32) for name in ("input_ids", "attention_mask")}
    with pytest.raises(LoraportError) as stop:
        runtime.run(inputs | narrow, "a")
    assert str(stop.value).splitlines() == [
        "the model refuses these inputs",
        "  - input_ids: expected tensor(int64), got tensor(int32)",
        "  - attention_mask: expected tensor(int64), got tensor(int32)",
    ]


def test_lists_are_named(runtime, inputs):
    lists = {name: inputs[name].tolist() for name in ("input_ids", "attention_mask")}
    expected = (
        r"- input_ids: .* OrtValue, got list\n  - attention_mask: .* array or an OrtValue, got"
    )
    with pytest.raises(LoraportError, match=expected):
        runtime.run(inputs | lists, "a")


def test_arrays_that_hold_no_numbers_are_named_alone(runtime, inputs):
    objects = {"input_ids": np.array([[5, None, 7]])}
    narrow = {"attention_mask": inputs["attention_mask"].astype(np.int32)}
    with pytest.raises(LoraportError) as stop:
        runtime.run(objects | {name: inputs[name] for name in inputs if name not in objects}, "a")
    assert str(stop.value).splitlines() == [
        "the model refuses these inputs",
        "  - input_ids: expected tensor(int64), got an array of object",
    ]
    with pytest.raises(
        LoraportError, match=r"of object\n.*mask: expected .*, got tensor\(int32\)$"
    ):
        runtime.run(objects | {n: inputs[n] for n in inputs if n not in objects} | narrow, "a")


def test_a_sequence_of_names_is_no_selection(runtime, inputs):
    for wrong in (["a", "b"], ("a", 0.5)):
        with pytest.raises(LoraportError, match="adapters: expected a name, names with strengths"):
            runtime.run(inputs, wrong)


def test_outputs_are_wanted_by_their_names(runtime, inputs):
    whole = runtime.run(inputs, "a")
    for wanted in ("logits", ["logits"]):
        got = runtime.run(inputs, "a", wanted)
        assert got.keys() == {"logits"} < whole.keys()
        assert np.array_equal(got["logits"], whole["logits"])
    with pytest.raises(LoraportError) as stop:
        runtime.run(inputs, "a", ["logits", "logit", "hidden"])
    told = str(stop.value).splitlines()
    assert told[0] == "the model's outputs and those wanted differ"
    expected = [
        "  - logit: expected one of the outputs logits, ",
        "  - hidden: expected one of the",
    ]
    assert [line[: len(start)] for line, start in zip(told[1:], expected, strict=True)] == expected
    with pytest.raises(LoraportError, match="outputs: expected at least one name, or None for all"):
        runtime.run(inputs, "a", [])
