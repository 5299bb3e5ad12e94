from pathlib import Path

import pytest

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


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraportError, match=r"expected one of .*peft"):
        write_adapter(Adapter(modules={}), tmp_path / "out", "zip")
