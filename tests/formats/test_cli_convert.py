"""``loraport convert`` as a user runs it."""

import pytest
import torch

from converters.formats.registry import adapter_formats, read_adapter
from loraport.cli import main


def _run(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["convert", *map(str, arguments)])
    return int(stop.value.code)


@pytest.mark.parametrize("name", sorted(adapter_formats()))
def test_there_and_back(name, case_of, tmp_path, capsys) -> None:
    case = case_of("plain")
    base = ["--base", case.base]
    assert _run(case.made.path, "--to", name, "-o", tmp_path / "there", *base) == 0
    assert _run(tmp_path / "there", "--to", "peft", "-o", tmp_path / "back") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{tmp_path / 'there'}: 6 modules as {name}" in captured.err
    original, back = read_adapter(case.made.path), read_adapter(tmp_path / "back")
    for path, module in original.modules.items():
        assert torch.equal(back.modules[path].lora_A, module.lora_A)


def test_copies_of_the_base_are_named(case_of, tmp_path, capsys) -> None:
    case = case_of("embedding")
    assert _run(case.made.path, "--to", "mlx", "-o", tmp_path / "x", "--base", case.base) == 0
    assert (
        "model.embed_tokens.weight: left out, it equals the base's own" in capsys.readouterr().err
    )


def test_mistakes_are_one_error_and_leave_nothing(case_of, tmp_path, capsys) -> None:
    dora = case_of("dora").made.path
    out = tmp_path / "x.gguf"
    capsys.readouterr()
    assert _run(dora, "--to", "gguf", "-o", out) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: GGUF cannot hold this adapter\n")
    assert "a DoRA magnitude" in error
    assert "give --base" in error
    assert not list(tmp_path.iterdir())
    assert _run(tmp_path / "none", "--to", "gguf", "-o", out) == 2
    assert "expected a file or directory, got none there" in capsys.readouterr().err
    assert _run(dora, "--to", "zip", "-o", out) == 2
    out.write_text("kept")
    assert _run(dora, "--to", "mlx", "-o", out) == 2
    assert out.read_text() == "kept"
