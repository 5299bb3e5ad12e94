"""What a path is, in facts and one table: the contents of ``loraport inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraport.cli.sizes import size_text
from loraport.errors import LoraportError, first_names

if TYPE_CHECKING:
    from loraport.bundle.slots import SlotTable

_SHOWN_NAMES = 8


@dataclass(frozen=True)
class Description:
    """What ``loraport inspect`` shows.

    Attributes:
        kind: What it is.
        facts: Name → value, in the order shown; of a tuple of many names a table shows the first.
        headings: Column headings of the table.
        rows: The table.
    """

    kind: str
    facts: Mapping[str, Any]
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the description as an object."""
        facts = {
            name: ", ".join(value) if isinstance(value, tuple) else value
            for name, value in asdict(self)["facts"].items()
        }
        rows = [dict(zip(self.headings, row, strict=True)) for row in self.rows]
        return {"kind": self.kind, "facts": facts, "rows": rows}


def describe(path: Path, base: str | None = None) -> Description:
    """Find out what a path is.

    Args:
        path: A file or directory.
        base: The base model, for adapter formats that need its names.

    Raises:
        LoraportError: If there is nothing, or it is nothing loraport knows.
    """
    from loraport.bundle.archive import is_packed_bundle
    from loraport.bundle.manifest import MANIFEST_FILE

    if not path.exists():
        raise LoraportError(f"{path}: expected a file or directory, got nothing of this name")
    if (path / MANIFEST_FILE).is_file() or is_packed_bundle(path):  # packed: refused with a remedy
        return _bundle(path)
    if path.suffix == ".onnx":
        return _onnx(path)
    from converters.formats.foreign import foreign_adapter
    from converters.formats.registry import detect_format

    try:
        if detect_format(path).name == "gguf" and (model := _gguf_model(path)) is not None:
            return model
    except LoraportError as no_adapter:
        if foreign_adapter(path) is not None:
            raise
        try:
            return _checkpoint(path)
        except LoraportError as no_checkpoint:
            raise LoraportError(
                f"{path}: expected an adapter, a checkpoint, an .onnx file or a bundle\n"
                f"  - {no_adapter}\n  - {no_checkpoint}"
            ) from None
    return _adapter(path, base)


def _adapter(path: Path, base: str | None) -> Description:
    from converters.formats.registry import detect_format, read_adapter

    adapter = read_adapter(path, base=base)
    facts: dict[str, Any] = {
        "format": detect_format(path).name,
        "base model": adapter.base_model or "not recorded",
        "base fingerprint": "recorded" if adapter.base_fingerprint else "not recorded",
        "modules": len(adapter.modules),
        "parameters": adapter.parameters,
        "size": size_text(adapter.nbytes),
        "ranks": _listed(module.rank for module in adapter.modules.values()),
        "alpha": _listed(module.alpha for module in adapter.modules.values()),
        "effective scaling": _listed(module.scaling for module in adapter.modules.values()),
        "dtypes": _listed(
            str(module.lora_A.dtype).removeprefix("torch.") for module in adapter.modules.values()
        ),
        "targets": _listed(path.rpartition(".")[2] for path in adapter.modules),
    }
    variants = {
        "DoRA": any(module.magnitude is not None for module in adapter.modules.values()),
        "rsLoRA": any(module.use_rslora for module in adapter.modules.values()),
    }
    if any(variants.values()):
        facts["variant"] = ", ".join(name for name, present in variants.items() if present)
    if adapter.replacements:
        facts["replaced parameters"] = ", ".join(adapter.replacements)
    rows = tuple(
        (
            name,
            module.kind.value,
            str(module.rank),
            f"{module.alpha:g}",
            f"{module.scaling:g}",
            str(list(module.lora_A.shape)),
            str(list(module.lora_B.shape)),
        )
        for name, module in adapter.modules.items()
    )
    headings = ("module", "kind", "rank", "alpha", "scaling", "lora_A", "lora_B")
    return Description("LoRA adapter", facts, headings, rows)


def _checkpoint(path: Path) -> Description:
    from loraport.base.checkpoint import Checkpoint

    checkpoint = Checkpoint(path)
    infos = {name: checkpoint.info(name) for name in checkpoint}
    facts: dict[str, Any] = {
        "shards": len(checkpoint.files),
        "tensors": len(infos),
        "size": size_text(sum(info.nbytes for info in infos.values())),
        "dtypes": _listed(info.dtype for info in infos.values()),
    }
    if (path / "config.json").is_file():
        from loraport.base.config import read_model_config

        config = read_model_config(path)
        facts["architecture"] = ", ".join(config.get("architectures") or ["?"])
        facts["layers"] = config.get("num_hidden_layers", "?")
    rows = tuple(
        (name, info.dtype, str(list(info.shape)), size_text(info.nbytes))
        for name, info in infos.items()
    )
    return Description("checkpoint", facts, ("tensor", "dtype", "shape", "size"), rows)


def _onnx(path: Path) -> Description:
    import onnx_ir as ir

    try:
        model = ir.load(path)
    except Exception as error:  # a damaged file surfaces as whatever protobuf raises
        raise LoraportError(f"{path}: expected an ONNX model, got: {error}") from error
    graph = model.graph
    defaults = set(graph.initializers)
    slots = sorted(
        {name.rpartition(".lora_")[0] for name in _names(graph.inputs) if ".lora_" in name}
    )
    operators = Counter(node.op_type for node in graph)
    facts = {
        "producer": f"{model.producer_name or '?'} {model.producer_version or ''}".strip(),
        "IR version": model.ir_version,
        "opsets": ", ".join(
            f"{domain or 'ai.onnx'} {v}" for domain, v in model.opset_imports.items()
        ),
        "nodes": len(graph),
        "operators": ", ".join(f"{count} {name}" for name, count in operators.most_common(8)),
        "weights": len(graph.initializers),
        "slots": len(slots),
    }
    rows = []
    for role, values in (("input", graph.inputs), ("output", graph.outputs)):
        for value in values:
            name = value.name or ""
            default = "" if ".lora_" not in name else "required"
            default = "base (zeros)" if name in defaults else default
            shown = "slot" if default else role
            rows.append((shown, name, str(value.dtype), str(value.shape), default))
    return Description("ONNX model", facts, ("", "name", "dtype", "shape", "default"), tuple(rows))


def _gguf_model(path: Path) -> Description | None:
    """Describe a whole model in a GGUF file; ``None`` for an adapter, and for a damaged file."""
    from loraport.base.gguf.reader import bounded_reader

    try:
        reader = bounded_reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    # The reader trusts its input; what is wrong is said where it is read as an adapter.
    except Exception:
        return None
    if fields.get("general.type", "model") == "adapter":
        return None
    architecture = fields.get("general.architecture", "?")
    facts: dict[str, Any] = {
        "tensors": len(reader.tensors),
        "size": size_text(sum(int(tensor.n_bytes) for tensor in reader.tensors)),
        "types": _listed(tensor.tensor_type.name for tensor in reader.tensors),
        "architecture": architecture,
        "layers": fields.get(f"{architecture}.block_count", "?"),
    }
    rows = tuple(
        (
            str(tensor.name),
            tensor.tensor_type.name,
            str([int(size) for size in reversed(tensor.shape)]),
            size_text(int(tensor.n_bytes)),
        )
        for tensor in reader.tensors
    )
    return Description("GGUF model", facts, ("tensor", "type", "shape", "size"), rows)


def _bundle(path: Path) -> Description:
    from loraport.bundle.manifest import read_manifest

    manifest = read_manifest(path)
    sizes = {
        name: (path / name).stat().st_size for name in manifest.files if (path / name).exists()
    }
    facts = {
        "base": manifest.base_name,
        "precision": manifest.precision,
        "made by": manifest.made_by,
        "slots": len(manifest.slots.slots),
        "modules with a slot": len(manifest.slots.modules()),
        "slots take": _variants(manifest.slots),
        "modules without": ", ".join(f"{k} ({v})" for k, v in manifest.unslotted.items()) or "none",
        "adapters": len(manifest.adapters),
        "golden cases": tuple(manifest.golden),
        "files": len(manifest.files),
        "size": size_text(sum(sizes.values())),
    }
    rows = tuple(
        (
            name,
            _listed(entry.ranks.values()),
            _listed(f"{scaling:g}" for scaling in entry.scalings.values()),
            str(len(entry.scalings)),
            size_text(sizes.get(entry.file, 0)),
        )
        for name, entry in manifest.adapters.items()
    )
    headings = ("adapter", "slot ranks", "scaling", "modules", "size")
    return Description("bundle", facts, headings, rows)


def _variants(table: SlotTable) -> str:
    """Say what a bundle's slots take, and which parameters adapters may store as a whole."""
    kinds = dict.fromkeys(slot.kind.value for slot in table.slots)
    extras = [role for role in ("gain", "bias") if any(getattr(s, role) for s in table.slots)]
    named = ", ".join((*kinds, *extras))
    if not table.replacements:
        return named
    names = (slot.parameter for slot in table.replacements)
    return f"{named}; as a whole {first_names(names, _SHOWN_NAMES)}"


def _names(values: Iterable[Any]) -> list[str]:
    return [value.name or "" for value in values]


def _listed(values: Iterable[Any]) -> str:
    """Return the distinct values with how often each occurs, the commonest first."""
    counts = Counter(values).most_common()
    return first_names(f"{_plain(value)} ×{count}" for value, count in counts) if counts else ""


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
