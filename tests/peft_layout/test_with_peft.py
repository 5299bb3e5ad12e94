"""Both directions with PEFT itself: it loads what we write, we load what it writes."""

import json
import re

import pytest
import torch
from peft_cases import CASES, load_with_peft, logits, make
from safetensors.torch import load_file, save_file

from loraport.errors import LoraportError
from loraport.peft_layout import is_peft, read_peft, write_peft


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_we_write(name, tmp_path):
    made = make(name, tmp_path / "theirs")
    write_peft(read_peft(made.path), tmp_path / "ours")
    # What PEFT loads from its own file is the reference: saving sorts the patterns' keys, and
    # the first that matches wins, so it may differ from the model that was saved.
    adapted = logits(load_with_peft(made.fresh_base(), made.path))
    again = logits(load_with_peft(made.fresh_base(), tmp_path / "ours"))
    # The same tensors through the same code: no tolerance at all.
    assert torch.equal(again, adapted)
    assert (adapted - logits(made.base)).abs().max() > 1e-3


def test_paths_may_be_texts(tmp_path):
    made = make(next(iter(CASES)), tmp_path / "theirs")
    assert is_peft(str(made.path))
    write_peft(read_peft(str(made.path)), str(tmp_path / "ours"))
    got, wanted = read_peft(tmp_path / "ours").modules, read_peft(made.path).modules
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[path].lora_B, wanted[path].lora_B) for path in wanted)


@pytest.mark.parametrize("name", CASES)
def test_no_tensor_is_lost_or_changed(name, tmp_path):
    made = make(name, tmp_path / "theirs")
    write_peft(read_peft(made.path), tmp_path / "ours")
    theirs = load_file(made.path / "adapter_model.safetensors")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    # With every bias, PEFT saves those of a module to save twice more: of the wrapped copy, and
    # of the original, which is switched off.
    again = (".original_module.", ".modules_to_save.")
    theirs = {key: tensor for key, tensor in theirs.items() if not any(x in key for x in again)}
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("parts", [0, 2])
def test_an_adapter_in_parts_is_told_from_one_without_tensors(tmp_path, parts):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    names = [f"adapter_model-{at + 1:05}-of-{parts:05}.safetensors" for at in range(parts)]
    for name in names:
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    got = f"parts of it ({', '.join(names)}); put their tensors into one" if parts else "no such"
    told = f"expected adapter_model.safetensors, got {got} file"
    with pytest.raises(LoraportError, match=f"{re.escape(told)}$"):
        read_peft(tmp_path)
