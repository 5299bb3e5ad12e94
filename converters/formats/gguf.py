"""llama.cpp's GGUF adapter.

Per base tensor ``NAME.lora_a`` ``[r, in]`` and ``NAME.lora_b`` ``[out, r]``; for the token
embedding ``lora_a`` is ``[vocab, r]``. The file has one ``alpha`` and llama.cpp divides it by each
tensor's rank, so an adapter whose ``scaling * r`` varies has the difference folded into B.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.formats.assembly import FoundTensor, assemble, check_values
from converters.formats.base_facts import module_paths, read_base_facts
from converters.formats.carried import CARRIED_KEY, Carried, carried_json, read_carried, restore
from converters.formats.features import PLAIN_KINDS, Feature, cannot_hold
from converters.formats.folding import fold_to, most_common
from converters.formats.format import AdapterFormat, FormatContext
from converters.formats.gguf_file import read_gguf, write_gguf
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.errors import LoraportError, Problems
from loraport.naming.gguf import (
    EMBEDDING_TENSOR,
    LORA_A,
    LORA_B,
    gguf_architecture,
    gguf_tensors,
    is_permuted_key,
    is_permuted_query,
    known_model_types,
)
from loraport.output import new_file
from loraport.scaling import lora_scaling

if TYPE_CHECKING:
    import torch

_MAGIC = b"GGUF"
_HOLDS = frozenset({Feature.EMBEDDING})
_DTYPES = ("float32", "float16", "bfloat16")
_GIVE_BASE = "give --base with the model the adapter was trained on"


@dataclass(frozen=True)
class _Layout:
    """How the base's modules lie in llama.cpp's file.

    Attributes:
        architecture: ``general.architecture``.
        tensors: Module path → base tensor.
        heads: Query heads, where query and key rows are permuted; else 0.
        kv_heads: Key heads likewise.
        tied: The head shares the embedding's weight.
    """

    architecture: str
    tensors: Mapping[str, str]
    heads: int = 0
    kv_heads: int = 0
    tied: bool = False

    def permuted_heads(self, tensor: str) -> int:
        """Return by how many heads a tensor's rows are permuted; 0 for not at all."""
        if is_permuted_query(tensor):
            return self.heads
        return self.kv_heads if is_permuted_key(tensor) else 0


def detect(path: Path) -> bool:
    """Tell whether ``path`` is a GGUF file."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) == _MAGIC
    except OSError:
        return False


def read(path: Path, context: FormatContext) -> Adapter:
    """Read a GGUF adapter.

    Raises:
        LoraportError: All problems of the file at once.
    """
    fields, tensors = read_gguf(path)
    problems = Problems()
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if fields.get(key) != expected:
            problems.add(key, repr(expected), repr(fields.get(key))[:80], "is it a whole model?")
    if fields.get("adapter.alora.invocation_tokens"):
        problems.add("adapter.alora.invocation_tokens", "none", "an aLoRA, which switches on late")
    alpha = fields.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not abs(alpha) < 1e12:
        problems.add("adapter.lora.alpha", "a number", repr(alpha)[:80])
    problems.raise_if_any(f"adapter {path} cannot be read")
    text = fields.get(CARRIED_KEY)
    carried = read_carried(text if isinstance(text, str) else None, str(path))
    layout = _layout_for_reading(path, str(fields.get("general.architecture")), carried, context)
    modules_by_tensor = {tensor: module_path for module_path, tensor in layout.tensors.items()}
    found: dict[str, dict[str, FoundTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        check_values(name, tensor, problems)
        part = {LORA_A: "lora_A", LORA_B: "lora_B"}.get(name[-len(LORA_A) :])
        module_path = modules_by_tensor.get(name[: -len(LORA_A)])
        if part is None or module_path is None or tensor.dim() != 2:
            problems.add(
                name,
                "lora_a or lora_b of a tensor of the base",
                f"a tensor {list(tensor.shape)}",
                _GIVE_BASE,
            )
            continue
        found[module_path][part] = FoundTensor(name, _read_part(part, name, tensor, layout))
    modules = {}
    for module_path, parts in found.items():
        module = assemble(
            module_path,
            parts,
            problems,
            # llama.cpp takes alpha 0 for "unscaled".
            alpha=alpha or None,
            embedding=layout.tensors[module_path] == EMBEDDING_TENSOR,
        )
        if module is not None:
            modules[module_path] = module
    if not found:
        problems.add(str(path), "adapter tensors", "none")
    problems.raise_if_any(f"adapter {path} cannot be read")
    return restore(Adapter(modules), carried)


def write(adapter: Adapter, path: Path, context: FormatContext) -> None:
    """Write a GGUF adapter that llama.cpp loads beside the base's GGUF.

    Raises:
        LoraportError: If GGUF cannot hold the adapter, naming everything it cannot, the base is
            missing or unknown, or ``path`` exists.
    """
    problems = cannot_hold(adapter, _HOLDS, "GGUF")
    layout = _layout_for_writing(adapter, context, problems)
    alpha = _common_alpha(adapter)
    tensors: dict[str, torch.Tensor] = {}
    for module_path, module in adapter.modules.items():
        tensor = layout.tensors.get(module_path)
        _check_module(module_path, module, tensor, layout, problems)
        if tensor is None or module.kind not in PLAIN_KINDS:
            continue
        folded = fold_to(module_path, module, lora_scaling(module.rank, alpha), problems)
        heads = layout.permuted_heads(tensor)
        if heads and folded.lora_B.shape[0] % (2 * heads):
            problems.add(module_path, f"rows of {heads} heads", f"{folded.lora_B.shape[0]} rows")
            continue
        a = folded.lora_A.T if tensor == EMBEDDING_TENSOR else folded.lora_A
        tensors[tensor + LORA_A] = a.detach().cpu().contiguous()
        tensors[tensor + LORA_B] = _interleaved(folded.lora_B, heads).detach().cpu().contiguous()
    if not adapter.modules:
        problems.add("the adapter", "LoRA modules", "none")
    problems.raise_if_any("GGUF cannot hold this adapter")
    facts = {"tensors": layout.tensors, "heads": layout.heads, "kv_heads": layout.kv_heads}
    stored = {path: t for path, t in layout.tensors.items() if path in adapter.modules}
    fields = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
        CARRIED_KEY: carried_json(adapter, {**facts, "tensors": stored}),
    }
    with new_file(path, force=context.force) as partial:
        write_gguf(partial, layout.architecture, fields, tensors)


def _common_alpha(adapter: Adapter) -> float:
    """Return the alpha that most modules have when the scaling is ``alpha / r``, never 0."""
    alphas = (module.scaling * module.rank for module in adapter.modules.values())
    # Twelve digits: alpha / r * r is not always alpha in binary.
    return most_common(float(f"{alpha:.12g}") for alpha in alphas if alpha)


def _check_module(
    path: str, module: LoraModule, tensor: str | None, layout: _Layout, problems: Problems
) -> None:
    if tensor is None:
        if layout.architecture:
            problems.add(
                path,
                f"a module that llama.cpp's {layout.architecture} has",
                "another",
                "merge the adapter into the base and convert that",
            )
        return
    for name, value in module.tensors().items():
        if str(value.dtype).removeprefix("torch.") not in _DTYPES:
            problems.add(f"{path}.{name}", f"one of {', '.join(_DTYPES)}", str(value.dtype))
    is_embedding = tensor == EMBEDDING_TENSOR
    if is_embedding != (module.kind is ModuleKind.EMBEDDING):
        problems.add(path, f"what {tensor} is", f"LoRA on a {module.kind.value}")
    if layout.tied and (is_embedding or tensor == "output.weight"):
        problems.add(
            path,
            "an embedding and a head of their own",
            "tied embeddings, one tensor in llama.cpp",
            "merge the adapter into the base and convert that",
        )


def _layout_for_writing(adapter: Adapter, context: FormatContext, problems: Problems) -> _Layout:
    directory = context.base_directory(adapter.base_model)
    if directory is None:
        problems.add("the base", "its architecture and head counts", "no base", _GIVE_BASE)
        return _Layout("", {})
    return _base_layout(directory, list(adapter.modules), problems)


def _layout_for_reading(
    path: Path, architecture: str, carried: Carried, context: FormatContext
) -> _Layout:
    directory = context.base_directory(carried.base_model)
    problems = Problems()
    if directory is not None:
        layout = _base_layout(directory, module_paths(directory), problems)
        if not problems.found and layout.architecture != architecture:
            problems.add("general.architecture", layout.architecture, architecture, _GIVE_BASE)
        problems.raise_if_any(f"adapter {path} does not fit the base {directory}")
        return layout
    facts = carried.format_facts
    tensors = facts.get("tensors")
    heads, kv_heads = facts.get("heads"), facts.get("kv_heads")
    if not isinstance(tensors, dict) or not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise LoraportError(
            f"adapter {path}: expected the base, which tells the modules' names and the order of "
            f"query and key rows, got none; {_GIVE_BASE}"
        )
    return _Layout(architecture, {str(k): str(v) for k, v in tensors.items()}, heads, kv_heads)


def _base_layout(directory: Path, paths: list[str], problems: Problems) -> _Layout:
    facts = read_base_facts(directory)
    architecture = gguf_architecture(facts.model_type)
    if architecture is None or facts.layers is None:
        problems.add(
            f"base {directory}",
            f"one of the architectures {known_model_types()}",
            facts.model_type,
            "merge the adapter and convert the merged model with llama.cpp",
        )
        return _Layout("", {})
    heads, kv_heads = facts.heads or 0, facts.kv_heads or 0
    if architecture.permuted and not heads:
        problems.add(f"base {directory}", "num_attention_heads", "none", "repair its config.json")
    return _Layout(
        architecture.name,
        gguf_tensors(paths, architecture, facts.layers),
        heads if architecture.permuted else 0,
        kv_heads if architecture.permuted else 0,
        facts.tied,
    )


def _read_part(part: str, name: str, tensor: torch.Tensor, layout: _Layout) -> torch.Tensor:
    base_tensor = name[: -len(LORA_A)]
    if part == "lora_A":
        return tensor.T if base_tensor == EMBEDDING_TENSOR else tensor
    heads = layout.permuted_heads(base_tensor)
    return _halves(tensor, heads) if heads and tensor.shape[0] % (2 * heads) == 0 else tensor


def _interleaved(b: torch.Tensor, heads: int) -> torch.Tensor:
    """Return B's rows in the order of interleaved rotary embeddings.

    Args:
        b: ``[heads * head_dim, r]``, halves of each head one after the other.
        heads: Number of heads; 0 leaves the rows alone.
    """
    if not heads:
        return b
    return b.reshape(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)


def _halves(b: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo `_interleaved`."""
    return b.reshape(heads, -1, 2, b.shape[1]).transpose(1, 2).reshape(b.shape)


FORMAT = AdapterFormat(
    name="gguf",
    summary="llama.cpp's GGUF adapter file",
    holds=_HOLDS,
    detect=detect,
    read=read,
    write=write,
)
