"""Bundles of the real SmolLM2-135M-Instruct, fp32 and int4, each with two adapters.

Each is there twice: with slots, and with slots whose rows have adapters of their own.

They take a minute to build, so they are kept in the user's cache, under a digest of everything
that has a part in them: this repository's sources and the versions of the packages beneath.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import torch

from loraport.base.finding import SMOLLM2, cache_directory, resolve_base
from loraport.base.loading import load_model

REPOSITORY = Path(__file__).parents[1]
PACKAGES = re.compile("torch|transformers|peft|numpy|onnx.*")
PRECISIONS = ("fp32", "int4")
# On every linear module but the head; their effects are several times what int4 kernels differ by.
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "b": {"r": 16, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
}
_SPREAD = 0.06
_LARGE = 64 << 20  # bytes


def real_bundles() -> Path:
    """Return a directory with the bundles ``fp32``, ``int4`` and, of rows, ``fp32-rows`` and
    ``int4-rows``, and the adapters ``a`` and ``b``.
    """
    root = cache_directory()
    target = root / f"real-bundles-{_digest()}"
    root.mkdir(parents=True, exist_ok=True)
    with (root / "real-bundles.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes: one builds
        if not target.is_dir():
            _forget_old(root)
            with tempfile.TemporaryDirectory(dir=root, prefix="building-") as temporary:
                made = Path(temporary) / "made"
                _build_apart(made)
                made.rename(target)
        os.utime(target)
    return target


def _build_apart(directory: Path) -> None:
    """Build in a process of its own: int4's golden outputs depend on the threads of a session.

    Which test comes first must not decide: some of them have their sessions on one thread.
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, __file__, str(directory)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


def _build(directory: Path) -> None:
    from converters.formats.registry import read_adapter
    from converters.onnx import ExportOptions, add_adapters, export_base
    from converters.onnx.slots.inserting import SlotOptions

    base = resolve_base(SMOLLM2)
    for seed, name in enumerate(ADAPTERS):
        _make_adapter(base, directory / name, ADAPTERS[name], seed)
    adapters = {name: read_adapter(directory / name) for name in ADAPTERS}
    with tempfile.TemporaryDirectory(dir=directory) as kept, _built_once(Path(kept)):
        for precision in PRECISIONS:
            for name, per_row in ((precision, False), (f"{precision}-rows", True)):
                options = ExportOptions(precision=precision, slots=SlotOptions(per_row=per_row))
                export_base(str(base), directory / name, options)
                add_adapters(directory / name, adapters)


@contextmanager
def _built_once(kept: Path) -> Iterator[None]:
    """Run GenAI's builder once for a precision, with its imports done; keep what it writes."""
    from warm_modules import WarmModules

    from converters.onnx import exporting
    from converters.onnx.exporters import genai_builder

    build = exporting.build_with_genai

    def once(base: Path, out: Path, *, precision: str, provider: str) -> None:
        made = kept / precision
        if not made.is_dir():
            made.mkdir()
            build(base, made, precision=precision, provider=provider)
        shutil.copytree(made, out, dirs_exist_ok=True)

    warm = WarmModules()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genai_builder, "subprocess", warm)
        patch.setattr(exporting, "build_with_genai", once)
        yield
    warm.close()


def _make_adapter(base: Path, out: Path, options: dict[str, Any], seed: int) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(task_type="CAUSAL_LM", **options)
        model = get_peft_model(load_model(str(base)), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, _SPREAD)
        model.save_pretrained(out)


def _digest() -> str:
    digest = hashlib.sha256()
    for package in ("loraport", "converters"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            digest.update(str(path.relative_to(REPOSITORY)).encode())
            digest.update(path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    found = {found.name: found.version for found in distributions()}
    below = sorted(item for item in found.items() if PACKAGES.fullmatch(item[0]))
    digest.update(repr(below).encode())
    return digest.hexdigest()[:16]


def _forget_old(root: Path) -> None:
    """Delete what other states of the sources left, but for the one that was used last."""
    found = sorted(root.glob("real-bundles-*/"), key=lambda path: path.stat().st_mtime)
    for path in found[:-1]:
        shutil.rmtree(path, ignore_errors=True)


def own_copy(bundle: Path, target: Path) -> Path:
    """Copy a bundle for a test to change; its large files are linked and must stay as they are."""

    def place(source: str, goal: str) -> None:
        if os.path.getsize(source) > _LARGE:
            try:
                os.link(source, goal)
            except OSError:  # another file system
                shutil.copy2(source, goal)
        else:
            shutil.copy2(source, goal)

    shutil.copytree(bundle, target, copy_function=place)
    return target


if __name__ == "__main__":
    _build(Path(sys.argv[1]))
