"""Names: parsing is the inverse of writing, and everything else is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraport.naming import (
    Part,
    packed_slot,
    parse_peft_key,
    peft_key,
    peft_parameter_key,
    slot_a,
    slot_b,
)

SEGMENT = st.from_regex(r"[a-zA-Z0-9_]{1,8}", fullmatch=True).filter(
    lambda text: "lora_" not in text and text != "base_layer"
)
PATH = st.lists(SEGMENT, min_size=1, max_size=5).map(".".join)


@given(PATH, st.sampled_from(list(Part)))
def test_adapter_keys_round_trip(path, part):
    parsed = parse_peft_key(peft_key(path, part))
    assert (parsed.module_path, parsed.part) == (path, part)


@given(PATH, st.sampled_from(["weight", "bias"]), st.booleans())
def test_parameter_keys_round_trip(path, leaf, adapted):
    parsed = parse_peft_key(peft_parameter_key(f"{path}.{leaf}", adapted=adapted))
    assert (parsed.module_path, parsed.part, parsed.parameter) == (path, None, f"{path}.{leaf}")


@pytest.mark.parametrize(
    ("old", "part"),
    [
        ("lora_magnitude_vector.weight", Part.MAGNITUDE),
        ("trainable_tokens_delta", Part.TOKEN_ROWS),
    ],
)
def test_what_older_peft_versions_wrote(old, part):
    assert parse_peft_key(f"base_model.model.fc.{old}").part is part


@pytest.mark.parametrize(
    "key",
    [
        "fc.lora_A.weight",
        "base_model.model.",
        "base_model.model..weight",
        "base_model.model.fc.lora_A.default.weight",
        "base_model.model.fc.lora_E",
        "base_model.model.lora_A.weight",
        "base_model.model.fc..lora_A.weight",
    ],
)
def test_foreign_keys_are_no_peft_keys(key):
    assert parse_peft_key(key) is None


def test_slot_names():
    assert (slot_a("h.0.q"), slot_b("h.0.q")) == ("h.0.q.lora_A", "h.0.q.lora_B")
    assert packed_slot(("h.0.q", "h.1.q")) == "h.0.q+h.1.q"
