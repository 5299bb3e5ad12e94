"""ONNX Runtime's ``.onnx_adapter``: named tensors and nothing else.

The tensors go under the names of an exported model's slots, ``<module>.lora_A`` ``[in, r]`` and
``<module>.lora_B`` ``[r, out]`` with the scaling folded into B, so the file fits a model with one
slot per module as it is. (A bundle whose operators are packed needs `loraport add` instead.)
What the format cannot say stands in a sidecar, ``<file>.json``: alphas, what is an embedding, and
a checksum, as the format has none.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.formats.assembly import FoundTensor, assemble, check_values
from converters.formats.carried import Carried, carried_json, read_carried, restore
from converters.formats.features import PLAIN_KINDS, Feature, cannot_hold
from converters.formats.folding import fold_to
from converters.formats.format import AdapterFormat, FormatContext
from loraport.adapter import Adapter, ModuleKind
from loraport.errors import LoraportError, Problems
from loraport.naming import is_module_path, parse_slot_input, slot_a, slot_b
from loraport.output import new_file, refuse_existing

if TYPE_CHECKING:
    import torch

_IDENTIFIER = b"TORT"  # flatbuffers puts it behind the root offset
_HOLDS: frozenset[Feature] = frozenset({Feature.EMBEDDING})


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
    problems = Problems()
    found: dict[str, dict[str, FoundTensor]] = defaultdict(dict)
    for name, tensor in _read_parameters(path).items():
        check_values(name, tensor, problems)
        slot = parse_slot_input(name)
        if slot is None or tensor.dim() != 2:
            problems.add(
                name,
                "a slot's input, MODULE.lora_A or MODULE.lora_B, as a matrix",
                f"a tensor {list(tensor.shape)}",
                "convert the adapter that this file was made from",
            )
            continue
        if not is_module_path(slot[0]):
            problems.add(
                name,
                "a slot of one module",
                "one of a packed operator",
                "convert the adapter that this bundle's file was made from",
            )
            continue
        found[slot[0]][slot[1]] = FoundTensor(name, tensor.T)
    modules = {}
    for module_path, tensors in found.items():
        module = assemble(
            module_path, tensors, problems, scaling=1.0, embedding=module_path in embeddings
        )
        if module is not None:
            modules[module_path] = module
    if not found:
        problems.add(str(path), "adapter tensors", "none")
    problems.raise_if_any(f"adapter {path} cannot be read")
    return restore(Adapter(modules), carried)


def write(adapter: Adapter, path: Path, context: FormatContext) -> None:
    """Write an ``.onnx_adapter`` file and its sidecar; the sidecar appears first.

    Raises:
        LoraportError: If the format cannot hold the adapter or an output exists.
    """
    problems = cannot_hold(adapter, _HOLDS, ".onnx_adapter")
    tensors: dict[str, torch.Tensor] = {}
    for module_path, module in adapter.modules.items():
        folded = fold_to(module_path, module, 1.0, problems)
        if folded.kind in PLAIN_KINDS:
            tensors[slot_a(module_path)] = folded.lora_A.T.contiguous()
            tensors[slot_b(module_path)] = folded.lora_B.T.contiguous()
    for name, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") not in _ONNX_TYPES:
            problems.add(name, f"one of {', '.join(_ONNX_TYPES)}", str(tensor.dtype))
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
    refuse_existing(path, force=context.force)
    with (
        new_file(path, force=context.force) as partial,
        new_file(sidecar(path), force=context.force) as partial_sidecar,
    ):
        _export(tensors, partial)
        facts["sha256"] = hashlib.sha256(partial.read_bytes()).hexdigest()
        partial_sidecar.write_text(carried_json(adapter, facts) + "\n")


# torch name → number of the type in ONNX; the types that ONNX Runtime computes LoRA in.
_ONNX_TYPES = {"float32": 1, "float16": 10, "float64": 11, "bfloat16": 16}


def _export(tensors: dict[str, torch.Tensor], path: Path) -> None:
    import onnxruntime
    import torch

    # The values only borrow the arrays' memory: both must live until the file is written.
    arrays = []
    values = {}
    for name, tensor in tensors.items():
        cpu = tensor.detach().cpu()
        bits = cpu.view(torch.uint16) if cpu.dtype is torch.bfloat16 else cpu
        arrays.append(bits.numpy())
        values[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            arrays[-1], _ONNX_TYPES[str(cpu.dtype).removeprefix("torch.")]
        )
    adapter_format = onnxruntime.AdapterFormat()
    adapter_format.set_adapter_version(1)
    adapter_format.set_model_version(1)
    adapter_format.set_parameters(values)
    adapter_format.export_adapter(str(path))


def _read_parameters(path: Path) -> dict[str, torch.Tensor]:
    import onnxruntime
    from torch.utils.dlpack import from_dlpack

    try:
        parameters = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
        tensors: dict[str, torch.Tensor] = {}
        for name, value in parameters.items():
            if value.element_type() not in _ONNX_TYPES.values():
                raise LoraportError(
                    f"adapter {path}: {name}: expected one of {', '.join(_ONNX_TYPES)}, "
                    f"got {value.data_type()}"
                )
            # A copy: the file is memory-mapped, and may be replaced after this.
            tensors[name] = from_dlpack(value).clone()
    except (RuntimeError, ValueError, UnicodeDecodeError, BufferError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise LoraportError(
            f"adapter {path}: expected an .onnx_adapter file, got: {reason}; fetch it again"
        ) from error
    return tensors


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
