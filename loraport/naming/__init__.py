"""Every name that a module or its adapter tensors go by, in one place.

The internal name of a module is its path in the PyTorch model, as
``model.named_modules()`` gives it (``model.layers.0.self_attn.q_proj``). `paths` derives
PEFT's keys and the ONNX graph inputs; each other format's names are one file here.
"""

from loraport.naming.paths import (
    PEFT_PREFIX,
    NameIndex,
    Part,
    PeftKey,
    bias_name,
    is_module_path,
    lanes_input,
    names_parameter,
    packed_slot,
    parse_peft_key,
    parse_slot_input,
    path_endings,
    peft_key,
    peft_parameter_key,
    slot_a,
    slot_b,
    slot_bias,
    slot_gain,
    slot_saved,
    weight_name,
)

__all__ = [
    "PEFT_PREFIX",
    "NameIndex",
    "Part",
    "PeftKey",
    "bias_name",
    "is_module_path",
    "lanes_input",
    "names_parameter",
    "packed_slot",
    "parse_peft_key",
    "parse_slot_input",
    "path_endings",
    "peft_key",
    "peft_parameter_key",
    "slot_a",
    "slot_b",
    "slot_bias",
    "slot_gain",
    "slot_saved",
    "weight_name",
]
