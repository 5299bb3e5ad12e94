"""Add packed adapters to a bundle."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from converters.onnx.modules.base_parameters import BaseParameters
from converters.onnx.packing.pack import PackedAdapter, pack
from loraport.adapter import Adapter, require_adapters
from loraport.bundle.golden import base_inputs, golden_reason
from loraport.bundle.manifest import (
    MANIFEST_FILE,
    BundledAdapter,
    Manifest,
    read_manifest,
    write_manifest,
)
from loraport.errors import LoraportError, Problems
from loraport.output import new_file
from loraport.process_lock import only_process
from loraport.runtime.recording import write_golden
from loraport.runtime.values import as_value, numpy_of

ADAPTERS_DIRECTORY = "adapters"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# What Windows opens instead of a file of this name, whatever follows a dot.
_DEVICES = (
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{n}" for port in ("com", "lpt") for n in range(10)),
)


def add_adapters(
    bundle: Path | str,
    adapters: Mapping[str, Adapter],
    *,
    force: bool = False,
    ignore_fingerprint: bool = False,
    base: Path | str | None = None,
    progress: Callable[[str], None] = lambda text: None,  # noqa: ARG005
) -> Manifest:
    """Pack adapters into a bundle, without exporting anything again.

    All of them are checked before the first file is written. The manifest, which makes them
    known, is replaced last; one that is to be replaced is taken out of the manifest first. So a
    bundle is whole at any moment, even if this is killed.

    Args:
        bundle: The bundle's directory.
        adapters: Name → adapter.
        force: Replace adapters that are already there.
        ignore_fingerprint: Accept adapters that were made for another base.
        base: The model that the bundle was exported from, see `resolve_base`; DoRA and trained
            tokens depend on its weights. Found by itself in most cases, see `base_parameters`.
        progress: Told what is being done.

    Returns:
        The new manifest.

    Raises:
        LoraportError: If a name is taken or unfit, an adapter belongs to another base, or has
            anything that finds no slot; if another process adds to the bundle meanwhile.
    """
    require_adapters(adapters)
    bundle, base = Path(bundle), None if base is None else str(base)
    read_manifest(bundle)  # nothing is created where there is no bundle
    with only_process(bundle / MANIFEST_FILE):
        return _add(bundle, adapters, force, ignore_fingerprint, base, progress)


def _add(
    bundle: Path,
    adapters: Mapping[str, Adapter],
    force: bool,
    ignore_fingerprint: bool,
    base: str | None,
    progress: Callable[[str], None],
) -> Manifest:
    manifest = read_manifest(bundle)
    without_golden = not manifest.golden and golden_reason(bundle) is not None
    if not without_golden:
        base_inputs(bundle, manifest)  # what the golden cases need, before anything is written
    _check_names(adapters, manifest.adapters, force=force)
    packed = {}
    parameters = BaseParameters(bundle, manifest, base)
    for name, adapter in adapters.items():
        if adapter.base_fingerprint is not None and not ignore_fingerprint:
            adapter.base_fingerprint.require_same_base(
                manifest.fingerprint, f"adapter {name!r}", f"bundle {bundle}"
            )
        elif not ignore_fingerprint:
            changed = {*adapter.modules, *(p.rpartition(".")[0] for p in adapter.replacements)}
            for path in manifest.computed:
                if path in changed:
                    parameters.require_own(path)
        try:
            packed[name] = pack(adapter, manifest.slots, manifest.unslotted, parameters)
        except LoraportError as error:
            raise LoraportError(f"adapter {name!r}: {error}") from error
    if manifest.adapters.keys() & adapters.keys():
        manifest = manifest.without(adapters)
        write_manifest(manifest, bundle)
    (bundle / ADAPTERS_DIRECTORY).mkdir(exist_ok=True)
    entries = dict(manifest.adapters)
    written: list[str] = []
    for name, contents in packed.items():
        progress(f"packing {name}")
        entry = _write_adapter(bundle, name, contents)
        entries[name] = entry
        written += [entry.file, entry.tensors]
    manifest = replace(manifest, adapters=entries).with_files(bundle, written)
    if without_golden:
        progress(f"no golden outputs: {golden_reason(bundle)}")
        write_manifest(manifest, bundle)
        return manifest
    progress("recording golden outputs")
    return write_golden(bundle, manifest, packed)


def _check_names(names: Iterable[str], present: Mapping[str, object], *, force: bool) -> None:
    """Refuse names that are no file names, or not everywhere (Windows', macOS' disks).

    Raises:
        LoraportError: Naming all of them.
    """
    problems = Problems()
    taken = {name.lower(): name for name in present}
    for name in names:
        other = taken.setdefault(name.lower(), name)
        if not _NAME.fullmatch(name):
            problems.add(name, "letters, digits, '.', '_' and '-'", "another name")
        elif name.partition(".")[0].lower() in _DEVICES:
            problems.add(name, "a name for files everywhere", "a device of Windows'")
        elif other != name:
            what = f"one that differs from {other} in capitals only, one file on some disks"
            problems.add(name, "a new name", what, "choose another")
        elif name in present and not force:
            problems.add(name, "a new name", "one the bundle has", "choose another, or --force")
    problems.raise_if_any("adapters cannot be added under these names")


def write_onnx_adapter(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write tensors as a ``.onnx_adapter`` file with onnxruntime's own writer."""
    import onnxruntime

    # The values point at the arrays, which must live until the file is written.
    made = {name: as_value(numpy_of(tensor), "cpu") for name, tensor in tensors.items()}
    contents = onnxruntime.AdapterFormat()
    contents.set_adapter_version(1)
    contents.set_model_version(1)
    contents.set_parameters({name: value for name, (value, _) in made.items()})
    contents.export_adapter(str(file))


def _write_adapter(bundle: Path, name: str, packed: PackedAdapter) -> BundledAdapter:
    entry = BundledAdapter(
        ranks=packed.ranks,
        scalings=packed.scalings,
        source_sha256=packed.source_sha256,
        file=f"{ADAPTERS_DIRECTORY}/{name}.onnx_adapter",
        tensors=f"{ADAPTERS_DIRECTORY}/{name}.safetensors",
    )
    with new_file(bundle / entry.tensors, force=True) as partial:
        save_file(dict(packed.tensors), partial)
    with new_file(bundle / entry.file, force=True) as partial:
        write_onnx_adapter(packed.tensors, partial)
    return entry
