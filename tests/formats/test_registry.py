from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from converters.formats.registry import adapter_formats, read_adapter, write_adapter
from loraport.adapter import Adapter
from loraport.errors import LoraportError


def test_peft_is_found() -> None:
    assert "peft" in adapter_formats()


def test_names_are_the_keys_and_nothing_heavy_is_needed_to_list_them() -> None:
    assert all(name == found.name for name, found in adapter_formats().items())


def test_an_unknown_thing_is_refused_with_the_known_formats(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"nothing that is known")
    with pytest.raises(LoraportError, match=r"expected one of the known formats \(.*peft"):
        read_adapter(tmp_path / "x.bin")
    with pytest.raises(LoraportError, match="got none there"):
        read_adapter(tmp_path / "absent")


def test_where_the_adapter_lies_is_told(tmp_path: Path) -> None:
    """PEFT saves an adapter that is not called "default" in a directory of that name."""
    for name in ("style", "tone"):
        (tmp_path / "saved" / name).mkdir(parents=True)
        (tmp_path / "saved" / name / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "saved" / "runs").mkdir()
    with pytest.raises(
        LoraportError, match=r"got a directory of adapters.*saved/style.*saved/tone"
    ):
        read_adapter(tmp_path / "saved")
    weights = tmp_path / "saved" / "style" / "adapter_model.safetensors"
    save_file({"base_model.model.fc.lora_A.weight": torch.ones(2, 3)}, weights)
    expected = rf"got a file of one that peft keeps in a directory; give {weights.parent}$"
    with pytest.raises(LoraportError, match=expected):
        read_adapter(weights)


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraportError, match=r"expected one of .*peft"):
        write_adapter(Adapter(modules={}), tmp_path / "out", "zip")
