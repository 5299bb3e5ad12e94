"""ONNX Runtime's ``.onnx_adapter``: named tensors and nothing else.

The tensors go under the names of an exported model's slots, ``<module>.lora_A`` ``[in, r]`` and
``<module>.lora_B`` ``[r, out]`` with the scaling folded into B, so the file fits a model with one
slot per module as it is. (A bundle whose operators are packed needs `loraport add` instead.)
DoRA adds ``<module>.lora_gain``, which is folded into B too and takes the base to compute; a LoRA
bias adds ``<module>.lora_bias``, a trained bias ``<module>.bias.lora_saved``.
What the format cannot say stands in a sidecar, ``<file>.json``: alphas, what is an embedding,
DoRA's magnitudes, and a checksum, as the format has none.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.formats.assembly import FoundTensor, check_values
from converters.formats.carried import Carried, carried_json, read_carried, restore
from converters.formats.features import Feature, cannot_hold
from converters.formats.folding import fold_to
from converters.formats.format import AdapterFormat, FormatContext
from converters.formats.onnx_adapter_file import ONNX_TYPES, read_parameters, write_parameters
from converters.formats.slot_parts import module_of_slot, slot_of_module
from loraport.adapter import Adapter, LoraModule, ModuleKind, Replacement
from loraport.base.weights import StoredWeights
from loraport.errors import LoraportError, Problems
from loraport.naming import is_module_path, parse_slot_input, slot_saved
from loraport.output import new_file, refuse_existing
from loraport.variants import lower

if TYPE_CHECKING:
    import torch

_IDENTIFIER = b"TORT"  # flatbuffers puts it behind the root offset
_HOLDS: frozenset[Feature] = frozenset(
    {Feature.EMBEDDING, Feature.CONV, Feature.DORA, Feature.LORA_BIAS, Feature.BIAS}
)


def sidecar(path: Path) -> Path:
    """Return the file that says what the adapter file cannot."""
    return path.with_name(f"{path.name}.json")


def detect(path: Path) -> bool:
    """Tell whether ``path`` carries the format's identifier."""
    try:
        with path.open("rb") as stream:
            return stream.read(8)[4:] == _IDENTIFIER
    except OSError:
        return False


def read(path: Path, context: FormatContext) -> Adapter:  # noqa: ARG001  one signature for all
    """Read an ``.onnx_adapter`` file and its sidecar.

    Raises:
        LoraportError: All problems of the file at once.
    """
    carried = _read_sidecar(path)
    embeddings = carried.format_facts.get("embeddings", [])
    magnitudes = carried.format_facts.get("magnitudes", {})
    problems = Problems()
    found: dict[str, dict[str, FoundTensor]] = defaultdict(dict)
    replacements: dict[str, Replacement] = {}
    for name, tensor in read_parameters(path).items():
        check_values(name, tensor, problems)
        slot = parse_slot_input(name)
        if slot is None or tensor.dim() < 1:
            problems.add(
                name,
                "a slot's input, such as MODULE.lora_A",
                f"a tensor {list(tensor.shape)}",
                "convert the adapter that this file was made from",
            )
        elif not is_module_path(slot[0]):
            problems.add(
                name,
                "a slot of one module",
                "one of a packed operator",
                "convert the adapter that this bundle's file was made from",
            )
        elif slot[1] == "lora_saved":
            replacements[slot[0]] = Replacement(tensor)
        else:
            found[slot[0]][slot[1]] = FoundTensor(name, tensor)
    modules = {}
    for module_path, tensors in found.items():
        module = module_of_slot(
            module_path,
            tensors,
            magnitudes.get(module_path),
            problems,
            embedding=module_path in embeddings,
        )
        if module is not None:
            modules[module_path] = module
    if not found and not replacements:
        problems.add(str(path), "adapter tensors", "none")
    problems.raise_if_any(f"adapter {path} cannot be read")
    return restore(Adapter(modules, replacements), carried)


def write(adapter: Adapter, path: Path, context: FormatContext) -> None:
    """Write an ``.onnx_adapter`` file and its sidecar; the sidecar appears first.

    Raises:
        LoraportError: If the format cannot hold the adapter or an output exists.
    """
    problems = cannot_hold(adapter, _HOLDS, ".onnx_adapter")
    tensors: dict[str, torch.Tensor] = {}
    magnitudes: dict[str, list[float]] = {}
    weights = _base_weights(adapter, context)
    for module_path, module in adapter.modules.items():
        if module.kind is ModuleKind.EXPERTS:
            continue
        folded = fold_to(module_path, module, 1.0, problems)
        gain = None
        if module.magnitude is not None:
            magnitudes[module_path] = module.magnitude.float().flatten().tolist()
            gain = _gain(module_path, module, weights, problems)
        tensors |= slot_of_module(module_path, folded, gain, problems)
    for parameter, replacement in adapter.replacements.items():
        if replacement.rows is None and replacement.tensor.dim() == 1:
            tensors[slot_saved(parameter)] = replacement.tensor.contiguous()
    for name, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") not in ONNX_TYPES:
            problems.add(name, f"one of {', '.join(ONNX_TYPES)}", str(tensor.dtype))
    if not adapter.modules:
        problems.add("the adapter", "LoRA modules", "none")
    problems.raise_if_any(".onnx_adapter cannot hold this adapter")
    facts: dict[str, Any] = {
        "embeddings": [
            module_path
            for module_path, module in adapter.modules.items()
            if module.kind is ModuleKind.EMBEDDING
        ]
    }
    if magnitudes:
        facts["magnitudes"] = magnitudes
    refuse_existing(path, force=context.force)
    with (
        new_file(path, force=context.force) as partial,
        new_file(sidecar(path), force=context.force) as partial_sidecar,
    ):
        write_parameters(tensors, partial)
        facts["sha256"] = hashlib.sha256(partial.read_bytes()).hexdigest()
        partial_sidecar.write_text(carried_json(adapter, facts) + "\n")


def _base_weights(adapter: Adapter, context: FormatContext) -> StoredWeights | None:
    if all(module.magnitude is None for module in adapter.modules.values()):
        return None
    directory = context.base_directory(adapter.base_model)
    return None if directory is None else StoredWeights(str(directory))


def _gain(
    path: str, module: LoraModule, weights: StoredWeights | None, problems: Problems
) -> torch.Tensor | None:
    """Return ``m / ||W + s B A||``, ``[out]``; note why there is none."""
    if weights is None:
        problems.add(path, "the base, which a DoRA magnitude takes here", "none", "give --base")
        return None
    try:
        return lower(module, weights(path)).gain
    except LoraportError as error:
        problems.add(path, "the base's weight, which a DoRA magnitude takes here", str(error))
        return None


def _read_sidecar(path: Path) -> Carried:
    file = sidecar(path)
    if not file.is_file():
        return Carried()
    try:
        text: Any = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoraportError(f"{file}: cannot be read: {error}") from error
    carried = read_carried(text, str(file))
    expected = carried.format_facts.get("sha256")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if expected is not None and found != expected:
        raise LoraportError(
            f"adapter {path}: expected the file that {file.name} was written for (sha256 "
            f"{str(expected)[:12]}), got {found[:12]}; fetch both again, or delete {file.name} if "
            "the other is meant to be new"
        )
    return carried


FORMAT = AdapterFormat(
    name="onnx",
    summary="ONNX Runtime's .onnx_adapter file",
    holds=_HOLDS,
    detect=detect,
    read=read,
    write=write,
)
