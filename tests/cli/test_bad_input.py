"""Every user's mistake: exit code 2, one error on stderr that names it, no traceback."""

import io
import json
import shutil
import sys
import zipfile

import pytest
import torch

from loraport.cli import main


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture
def places(bundle, tiny_base, adapter_a, adapter_b, tmp_path):
    """Names that the command lines below use."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with zipfile.ZipFile(tmp_path / "packed", "w") as packed:
        packed.write(bundle / "manifest.json", "manifest.json")
    (tmp_path / "taken").mkdir()
    damaged = shutil.copytree(adapter_a, tmp_path / "damaged")
    (damaged / "adapter_config.json").write_text("{")
    cut = shutil.copytree(adapter_a, tmp_path / "cut")
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    torn = shutil.copytree(bundle, tmp_path / "torn")
    (torn / "manifest.json").write_text("{")
    orphan = shutil.copytree(bundle, tmp_path / "orphan")
    (orphan / "sources.json").write_text("{}")
    odd = shutil.copytree(bundle, tmp_path / "odd")
    (odd / "sources.json").write_text(json.dumps({"base": str(tiny_base), "adapters": ["a"]}))
    other = shutil.copytree(tiny_base, tmp_path / "other")
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    return {
        "BUNDLE": bundle,
        "BASE": tiny_base,
        "A": adapter_a,
        "B": adapter_b,
        "HERE": tmp_path,
        "DAMAGED": damaged,
        "CUT": cut,
        "TORN": torn,
        "ORPHAN": orphan,
        "ODD": odd,
        "OTHER": other,
    }


CASES = [
    ("", "Usage:"),
    ("sail", "No such command 'sail'"),
    # before the base is looked for, not after hours of training
    ("train nothing x -o HERE/notes.txt --force", "is a file; a directory is to be written there"),
    ("sweep nothing x -o HERE/notes.txt --force", "is a file; a directory is to be written there"),
    ("eval nothing x --force --per-example HERE/empty", "is a directory; a file is to be written"),
    # export
    ("export", "Missing argument 'BASE'"),
    ("export BASE", "Missing option '-o'"),
    ("export BASE -o HERE/out --precision fp8", "'fp8' is not one of"),
    ("export HERE/nowhere -o HERE/out", "nowhere"),
    ("export HERE/empty -o HERE/out", "expected a model directory with config.json"),
    ("export HERE/notes.txt -o HERE/out", "expected a directory or a .gguf file"),
    ("export nothing -o HERE/out", "expected a model directory, a .gguf file, a hub name"),
    ("export BASE -o HERE/taken", "already exists; choose another output or pass --force"),
    ("export BASE -o HERE/notes.txt --force", "is a file; a directory is to be written there"),
    ("export BASE -o HERE/out --adapter a", "expected NAME=PATH, got 'a'"),
    ("export BASE -o HERE/out --adapter a=A --adapter a=B", "'a' is given twice"),
    ("export BASE -o HERE/out --adapter a=HERE/nowhere", "expected a file or directory"),
    ("export HERE/broken.onnx -o HERE/out", "expected an ONNX model"),
    ("export HERE/nowhere.onnx -o HERE/out", "nowhere.onnx: cannot be read"),
    ("export BASE -o HERE/out --base BASE", "--base, --input and --copy-data are for a MODEL.onnx"),
    ("export BASE -o HERE/out --copy-data", "--base, --input and --copy-data are for a MODEL.onnx"),
    # add
    ("add", "Missing argument 'BUNDLE'"),
    ("add BUNDLE", "Missing argument 'NAME=ADAPTER"),
    ("add BUNDLE x=HERE/nowhere", "expected a file or directory, got none there"),
    ("add BUNDLE x=HERE/empty", "expected one of the known formats"),
    ("add BUNDLE x=DAMAGED", "adapter_config.json"),
    ("add BUNDLE x=CUT", "adapter_model.safetensors"),
    ("add BUNDLE A", "expected NAME=PATH"),
    ("add BUNDLE x=A x=B", "'x' is given twice"),
    ("add BUNDLE a=A", "a: expected a new name, got one the bundle has"),
    ("add BUNDLE ../x=A", "expected letters, digits"),
    ("add HERE/empty x=A", "expected a directory with manifest.json"),
    ("add TORN x=A", "manifest.json: expected its own sha256"),
    # run
    ("run BUNDLE", "Missing option '--prompt'"),
    ("run HERE/nowhere --prompt hi", "expected a directory with manifest.json"),
    ("run TORN --prompt hi", "manifest.json: expected its own sha256"),
    ("run BUNDLE --prompt hi --adapter c", "adapter 'c': expected one of the bundle's (a, b)"),
    ("run BUNDLE --prompt hi --adapter a=much", "expected NAME or NAME=STRENGTH, a number"),
    ("run BUNDLE --prompt hi --adapter a=nan", "expected NAME or NAME=STRENGTH, a number"),
    ("run BUNDLE --prompt hi --adapter a --adapter a=2", "expected each adapter once"),
    ("run BUNDLE --prompt= --raw", "prompt: expected some text, got none"),
    ("run BUNDLE --prompt hi --max-new-tokens 0", "'--max-new-tokens'"),
    ("run BUNDLE --prompt hi --temperature -1", "'--temperature'"),
    ("run BUNDLE --prompt hi --top-p 0", "'--top-p'"),
    ("run BUNDLE --prompt hi --provider tpu", "'tpu' is not one of"),
    # verify
    ("verify HERE/nowhere", "expected a directory with manifest.json"),
    ("verify TORN", "manifest.json: expected its own sha256"),
    ("verify BUNDLE --adapter c", "adapter 'c': expected one of the bundle's (a, b)"),
    ("verify BUNDLE --adapter a=HERE/nowhere", "expected the adapter it was packed from"),
    ("verify BUNDLE --adapter a=B", "expected the one it was packed from"),
    ("verify BUNDLE --base HERE/nowhere", "nowhere"),
    ("verify BUNDLE --base OTHER", "model.layers.0.mlp.up_proj: expected base weight"),
    ("verify ORPHAN", "give --base"),
    ("verify ORPHAN --base BASE", "which the bundle does not say, got none; give --adapter a=PATH"),
    ("verify ODD", "give --adapter a=PATH"),
    # inspect
    ("inspect", "Missing argument 'PATH'"),
    ("inspect HERE/nowhere", "got nothing of this name"),
    ("inspect HERE/empty", "expected an adapter, a checkpoint, an .onnx file or a bundle"),
    ("inspect HERE/notes.txt", "expected an adapter, a checkpoint, an .onnx file or a bundle"),
    ("inspect HERE/packed", "'loraport bundle unpack' makes one of a packed bundle"),
    ("inspect HERE/broken.onnx", "expected an ONNX model"),
    ("inspect CUT", "adapter_model.safetensors"),
    ("inspect TORN", "manifest.json: expected its own sha256"),
]


def test_each_mistake(places, capsys):
    # One test for all: they share the places, and each is a moment.
    wrong = []
    for line, expected in CASES:
        arguments = [
            "/".join(str(places.get(part, part)) for part in word.split("/"))
            if "=" not in word
            else word.partition("=")[0]
            + "="
            + "/".join(str(places.get(part, part)) for part in word.partition("=")[2].split("/"))
            for word in line.split()
        ]
        code, out, err = call(capsys, *arguments)
        shown = " ".join(err.split())
        sound = (
            code == 2
            and expected in shown
            and ("error:" in err.lower() or not line)
            and "Traceback" not in err
            and out == ""
        )
        if not sound:
            wrong.append(f"{line!r}: {code}, {out[-200:]!r}, {err[-500:]!r}")
    assert not wrong, "\n".join(wrong)
    assert not (places["HERE"] / "out").exists()
    assert not list(places["HERE"].glob(".*partial*"))


def test_force_replaces_nothing_that_is_read(bundle, tiny_base, adapter_a, tmp_path, capsys):
    home = tmp_path / "home"
    shutil.copytree(tiny_base, home / "base")
    shutil.copytree(tiny_base, home / "tuned")
    shutil.copytree(adapter_a, home / "a")
    (home / "rows").write_text('{"text": "red green"}\n' * 9)
    assert call(capsys, "bundle", "pack", bundle, "-o", home / "zip")[0] == 0
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    few = "--steps 1 --batch-size 1 --device cpu --max-length 8 --rank 2"
    wrong = []
    for line, inputs in (
        (f"train base rows {few} --validation a/README.md", "base rows a"),
        (f"train base rows {few} --resume", "base rows"),
        (f"sweep base rows {few} --lr 1e-3", "base rows"),
        ("extract base tuned --rank 1", "base tuned"),
        ("compose a=1 --base base", "a base"),
        ("convert a --to mlx --base base", "a base"),
        ("convert a --to kohya", "a"),
        ("merge base a", "base a"),
        ("export base --adapter a=a", "base a"),
        ("bundle unpack zip", "zip"),
    ):
        words = [
            str(home / word) if (home / word).exists() else word.replace("=a", f"={home / 'a'}")
            for word in line.replace("a=1", str(home / "a")).split()
        ]
        for output in (home, *(home / name for name in inputs.split())):
            code, out, err = call(capsys, *words, "-o", output, "--force")
            shown = " ".join(err.split())
            there = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
            said = f"error: {output}: expected an output that is no input" in shown
            if code != 2 or not said or out or there != before:
                wrong.append(f"{line!r} -o {output}: {code}, {err[-300:]!r}")
    assert not wrong, "\n".join(wrong)
    rows = home / "rows"
    code, _, err = call(capsys, "eval", home / "base", rows, "--per-example", rows, "--force")
    assert code == 2
    assert "expected an output that is no input" in " ".join(err.split())
    assert rows.read_bytes() == before[rows]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("command", ["run {} --prompt hi", "verify {}"])
def test_cuda_where_there_is_none(bundle, capsys, command):
    code, out, err = call(capsys, *command.format(bundle).split(), "--provider", "cuda")
    assert code == 2
    assert "CUDA" in err
    assert "Traceback" not in err
    assert out == ""


def test_a_verification_with_a_base_that_lacks_weights(bundle, tiny_base, tmp_path, capsys):
    """Of the one that is missing no slot is, so that no fingerprint tells."""
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(tiny_base, tmp_path / "lacking")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    code, out, err = call(capsys, "verify", bundle, "--base", base)
    assert (code, out) == (2, "")
    assert f"base {base}: expected all of the model's weights in its files" in err
    assert "got none for 1, model.norm.weight among them" in err


def test_a_flipped_byte_is_refused(own_bundle, capsys):
    data = bytearray((own_bundle / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (own_bundle / "model.onnx.data").write_bytes(data)
    code, out, err = call(capsys, "run", own_bundle, "--prompt", "hi")
    assert code == 2
    assert "model.onnx.data: expected sha256" in err
    assert out == ""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--temperature", "nan"], "temperature: expected a finite number, 0 or more, got nan"),
        (["--top-p", "nan"], "top_p: expected more than 0, at most 1, got nan"),
        (["--seed", "-1"], "seed: expected a whole number, 0 or more, got -1"),
        (["--prompt", "-"], "--prompt -: expected text on stdin, got: 'utf-8' codec"),
    ],
)
def test_run_tells_what_it_cannot_use_before_it_opens_the_bundle(
    options, expected, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Ahoy \xff"), "utf-8"))
    code, out, err = call(capsys, "run", tmp_path / "none", "--prompt", "hi", *options)
    assert (code, out) == (2, "")
    assert expected in err


def test_a_disk_that_refuses_is_no_traceback(own_bundle, adapter_b, capsys, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("converters.onnx.packing.adding.save_file", full)
    code, _, err = call(capsys, "add", own_bundle, f"c={adapter_b}")
    assert code == 2
    assert "error: [Errno 28] No space left on device" in err


@pytest.mark.parametrize("output", ["", ".", "/", "..", "a/..", "a"])
@pytest.mark.parametrize(
    "given",
    [
        ("train",),
        ("train", "--force"),
        ("sweep",),
        ("sweep", "--force"),
        ("extract", "--rank", "1"),
    ],
)
def test_an_output_without_a_name(capsys, monkeypatch, tmp_path, given, output):
    """Control: an output with a name goes on to the next mistake."""
    monkeypatch.chdir(tmp_path)
    name, *more = given
    code, out, err = call(capsys, name, "no-base", "no-data", "-o", output, *more)
    assert (code, out) == (2, "")
    assert ("expected the name of something new" in err) is (output != "a")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
