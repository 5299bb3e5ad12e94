"""Ways to spoil a bundle, and how a runner in any language must answer."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from loraport.bundle.seal import sealed

MISMATCH = 1
REFUSED = 2
MANIFEST = "manifest.json"
ADAPTER = "adapters/a.safetensors"
GOLDEN = "golden/base.safetensors"


@dataclass(frozen=True)
class Fault:
    """A spoilt bundle, the exit code it must give and a word that the message must have."""

    spoil: Callable[[Path], None]
    word: str
    code: int = REFUSED


def flip_byte(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Let ``edit`` change the manifest in place, and seal it again: to get past that check."""
    document = json.loads((bundle / MANIFEST).read_text())
    edit(document)
    (bundle / MANIFEST).write_text(sealed(document, MANIFEST))


def rehash(bundle: Path, *paths: str) -> None:
    """Give changed files the right hashes again, as someone who means harm would."""
    edit_manifest(
        bundle,
        lambda document: document["files"].update(
            {path: hashlib.sha256((bundle / path).read_bytes()).hexdigest() for path in paths}
        ),
    )


def _with_tensors(path: str, edit: Callable[[dict[str, np.ndarray]], None]) -> Any:
    def spoil(bundle: Path) -> None:
        tensors = load_file(bundle / path)
        edit(tensors)
        save_file(tensors, bundle / path)
        rehash(bundle, path)

    return spoil


def _with_content(path: str, change: Callable[[bytes], bytes]) -> Any:
    def spoil(bundle: Path) -> None:
        (bundle / path).write_bytes(change((bundle / path).read_bytes()))
        rehash(bundle, path)

    return spoil


def _with_header(entry: dict[str, Any]) -> Any:
    header = json.dumps({"t": entry}).encode()
    return _with_content(ADAPTER, lambda _: struct.pack("<Q", len(header)) + header + bytes(64))


def _with_manifest(edit: Callable[[dict[str, Any]], None]) -> Any:
    return lambda bundle: edit_manifest(bundle, edit)


def resealed(text: str) -> str:
    """Return a manifest's text, whatever it is now, with a right seal at its end."""
    member = '"manifest_sha256": "'
    head = text.partition(member)[0] + member
    return head + hashlib.sha256(head.encode()).hexdigest() + '"\n}\n'


def _with_text(change: Callable[[str], str], *, seal: bool = False) -> Any:
    def spoil(bundle: Path) -> None:
        text = change((bundle / MANIFEST).read_text())
        (bundle / MANIFEST).write_text(resealed(text) if seal else text)

    return spoil


def _widen(tensors: dict[str, np.ndarray]) -> None:
    """Make the adapter one for a base with wider layers."""
    for name, value in list(tensors.items()):
        if name.endswith(".lora_A"):
            tensors[name] = np.concatenate([value, value])


def _set(name_end: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        next(array for name, array in tensors.items() if name.endswith(name_end)).flat[0] = value

    return edit


def _drop(name_end: str) -> Callable[[dict[str, np.ndarray]], None]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        del tensors[next(name for name in tensors if name.endswith(name_end))]

    return edit


def _rename(tensors: dict[str, np.ndarray]) -> None:
    for name in list(tensors):
        tensors[f"other.{name}"] = tensors.pop(name)


def _wrong_onnx_adapter(bundle: Path) -> None:
    """Put another adapter's tensors into one of two files that should be the same."""
    (bundle / "adapters/a.onnx_adapter").write_bytes(
        (bundle / "adapters/b.onnx_adapter").read_bytes()
    )
    rehash(bundle, "adapters/a.onnx_adapter")


def _move_out(bundle: Path) -> None:
    outside = bundle.parent / "outside.safetensors"
    outside.write_bytes((bundle / ADAPTER).read_bytes())
    digest = hashlib.sha256(outside.read_bytes()).hexdigest()

    def edit(document: dict[str, Any]) -> None:
        document["files"]["adapters/../../outside.safetensors"] = digest
        document["adapters"]["a"]["tensors"] = "adapters/../../outside.safetensors"

    edit_manifest(bundle, edit)


FAULTS = {
    "missing file": Fault(lambda bundle: (bundle / "model.onnx.data").unlink(), "model.onnx.data"),
    "truncated file": Fault(
        lambda bundle: (bundle / ADAPTER).write_bytes((bundle / ADAPTER).read_bytes()[:-7]), ADAPTER
    ),
    "missing manifest": Fault(lambda bundle: (bundle / MANIFEST).unlink(), MANIFEST),
    "cut manifest": Fault(_with_text(lambda text: text[: len(text) // 2]), "own sha256"),
    "empty manifest": Fault(_with_text(lambda _: ""), "own sha256"),
    "flipped letter in the manifest": Fault(
        _with_text(lambda text: text.replace('"made_by": "l', '"made_by": "m', 1)),
        f"{MANIFEST}: expected sha256",
    ),
    "flipped digit of the manifest's sha256": Fault(
        _with_text(lambda text: text[:-5] + ("0" if text[-5] != "0" else "1") + text[-4:]),
        f"{MANIFEST}: expected sha256",
    ),
    "something after the manifest's end": Fault(_with_text(lambda text: text + " "), "own sha256"),
    "manifest ends in the middle": Fault(
        _with_text(lambda text: text[: len(text) // 2], seal=True), MANIFEST
    ),
    "manifest version": Fault(
        _with_manifest(lambda document: document.update(schema_version=2)), "schema version 1"
    ),
    "manifest is a list": Fault(_with_text(lambda _: "[]", seal=True), MANIFEST),
    "manifest nests deeply": Fault(_with_text(lambda _: "[" * 100_000, seal=True), "nesting"),
    "manifest says a thing twice": Fault(
        _with_text(
            lambda text: text.replace('"tolerance"', '"tolerance": 9, "tolerance"', 1), seal=True
        ),
        MANIFEST,
    ),
    "tolerance is NaN": Fault(
        _with_manifest(lambda document: document.update(tolerance=float("nan"))), MANIFEST
    ),
    "tolerance is negative": Fault(
        _with_manifest(lambda document: document.update(tolerance=-1)), "tolerance"
    ),
    "path leaves the bundle": Fault(_move_out, "inside the bundle"),
    "file without a hash": Fault(
        _with_manifest(lambda document: document["files"].pop(ADAPTER)), ADAPTER
    ),
    "adapter without a golden case": Fault(
        _with_manifest(lambda document: document["golden"].pop("adapter-a")), "golden case"
    ),
    "adapter of a wider base": Fault(_with_tensors(ADAPTER, _widen), "does not fit"),
    "adapter of other modules": Fault(_with_tensors(ADAPTER, _rename), "does not fit"),
    "half a slot": Fault(_with_tensors(ADAPTER, _drop(".lora_B")), "lora_B"),
    "NaN in an adapter": Fault(_with_tensors(ADAPTER, _set(".lora_B", np.nan)), "finite"),
    "golden case without its adapters": Fault(
        _with_manifest(lambda document: document["golden"]["blend"].pop("adapters")), "blend"
    ),
    "infinity in golden outputs": Fault(_with_tensors(GOLDEN, _set("logits", np.inf)), "finite"),
    "no golden outputs": Fault(_with_tensors(GOLDEN, _drop("output.logits")), "outputs"),
    "golden input missing": Fault(_with_tensors(GOLDEN, _drop("input.input_ids")), "input_ids"),
    "adapter file is no adapter": Fault(
        _with_content("adapters/a.onnx_adapter", lambda content: content[:8] + bytes(200)),
        "adapters/a.onnx_adapter",
    ),
    "model is no model": Fault(
        _with_content("model.onnx", lambda content: content[:1000]), "model.onnx"
    ),
    "header longer than the file": Fault(
        _with_content(ADAPTER, lambda content: struct.pack("<Q", 1 << 62) + content[8:]), "header"
    ),
    "tensor beyond the file": Fault(
        _with_header({"dtype": "F32", "shape": [4], "data_offsets": [56, 72]}), ADAPTER
    ),
    "shape that overflows": Fault(
        _with_header({"dtype": "F32", "shape": [1 << 32, 1 << 32], "data_offsets": [0, 0]}),
        ADAPTER,
    ),
    "negative offsets": Fault(
        _with_header({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}), "whole number"
    ),
    "other golden outputs": Fault(
        _with_tensors(GOLDEN, _set("logits", 100.0)), "FAILED", code=MISMATCH
    ),
    "adapter files that differ": Fault(_wrong_onnx_adapter, "FAILED", code=MISMATCH),
    "another adapter": Fault(
        _with_tensors(ADAPTER, _set(".lora_B", 50.0)), "FAILED", code=MISMATCH
    ),
}
