"""MLX's adapter directory, as mlx-lm trains and loads it.

``adapters.safetensors`` holds ``lora_a`` ``[in, r]``, ``lora_b`` ``[r, out]`` and DoRA's ``m``
``[out]``; ``adapter_config.json`` holds one rank and one scale for all modules. So a scale that
differs is folded into B, and a rank that differs is padded with zeros, which compute nothing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.formats.assembly import FoundTensor, assemble, check_values
from converters.formats.base_facts import BaseFacts, read_base_facts
from converters.formats.carried import CARRIED_KEY, carried_json, read_carried, restore
from converters.formats.features import PLAIN_KINDS, Feature, cannot_hold
from converters.formats.folding import fold_to, most_common
from converters.formats.format import AdapterFormat, FormatContext
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.base.checkpoint import Checkpoint
from loraport.errors import LoraportError, Problems
from loraport.json_object import read_json_object
from loraport.naming.mlx import mlx_key, mlx_module, mlx_targets, parse_mlx_key, torch_module
from loraport.output import new_directory
from loraport.safetensors_file import write_safetensors

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapters.safetensors"
_HOLDS = frozenset({Feature.EMBEDDING, Feature.DORA})
_DTYPES = ("float32", "float16", "bfloat16")


def detect(path: Path) -> bool:
    """Tell whether ``path`` is a directory with mlx-lm's two files."""
    return (path / WEIGHTS_FILE).is_file() and (path / CONFIG_FILE).is_file()


def read(path: Path, context: FormatContext) -> Adapter:
    """Read an adapter directory of mlx-lm.

    Raises:
        LoraportError: All problems of the adapter at once.
    """
    config = read_json_object(path / CONFIG_FILE)
    if config.get("fine_tune_type") == "full":
        raise LoraportError(
            f"adapter {path}: expected fine_tune_type lora or dora, got full, whole weights; fuse "
            "it into its base with mlx-lm, and extract an adapter with `loraport extract`"
        )
    problems = Problems()
    scaling = _scale(config, problems)
    carried_text = config.get(CARRIED_KEY)
    carried = read_carried(
        carried_text if isinstance(carried_text, str) else None, str(path / CONFIG_FILE)
    )
    named = config.get("model")
    recorded = named if isinstance(named, str) else None
    base = _base(context, recorded)
    model_type = base.model_type if base else carried.format_facts.get("model_type")
    checkpoint = Checkpoint(path / WEIGHTS_FILE)
    found: dict[str, dict[str, FoundTensor]] = defaultdict(dict)
    for name in checkpoint:
        tensor = checkpoint.load(name)
        check_values(name, tensor, problems)
        parsed = parse_mlx_key(name)
        if parsed is None or tensor.dim() > 2:
            problems.add(
                name,
                "lora_a, lora_b or m of a linear layer or embedding",
                f"a tensor {list(tensor.shape)}",
                "fuse it into its base with mlx-lm and use that",
            )
            continue
        found[torch_module(parsed[0], model_type)][parsed[1]] = FoundTensor(
            name, tensor.T if tensor.dim() == 2 else tensor
        )
    embeddings = carried.format_facts.get("embeddings")
    modules = {}
    for module_path, tensors in found.items():
        embedding = (
            module_path in embeddings if isinstance(embeddings, list) else _embeds(module_path)
        )
        module = assemble(module_path, tensors, problems, scaling=scaling, embedding=embedding)
        if module is not None:
            modules[module_path] = module
    _check_fine_tune_type(config, modules, problems)
    if not found:
        problems.add(str(path / WEIGHTS_FILE), "adapter tensors", "none")
    problems.raise_if_any(f"adapter {path} cannot be read")
    return restore(Adapter(modules, base_model=recorded), carried)


def write(adapter: Adapter, path: Path, context: FormatContext) -> None:
    """Write an adapter directory that mlx-lm loads.

    Raises:
        LoraportError: If MLX cannot hold the adapter, naming everything it cannot, or ``path``
            exists.
    """
    problems = cannot_hold(adapter, _HOLDS, "MLX")
    base = _base(context, adapter.base_model)
    model_type = base.model_type if base else None
    scaling = most_common(m.scaling for m in adapter.modules.values() if m.scaling)
    rank = max((module.rank for module in adapter.modules.values()), default=0)
    tensors: dict[str, torch.Tensor] = {}
    for module_path, module in adapter.modules.items():
        _check_module(module_path, module, adapter, base, problems)
        if module.kind not in PLAIN_KINDS:
            continue
        folded = fold_to(module_path, module, scaling, problems)
        mlx_path = mlx_module(module_path, model_type)
        for field, tensor in folded.tensors().items():
            if field != "lora_B_bias":
                tensors[mlx_key(mlx_path, field)] = _padded(field, tensor, rank)
    if not adapter.modules:
        problems.add("the adapter", "LoRA modules", "none")
    problems.raise_if_any("MLX cannot hold this adapter")
    mlx_paths = [mlx_module(module_path, model_type) for module_path in adapter.modules]
    num_layers, keys = mlx_targets(mlx_paths, base.layers if base else None)
    dora = any(module.magnitude is not None for module in adapter.modules.values())
    facts = {
        "model_type": model_type,
        "embeddings": [
            path for path, m in adapter.modules.items() if m.kind is ModuleKind.EMBEDDING
        ],
    }
    config = {
        "model": adapter.base_model,
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": rank,
            "scale": scaling,
            "dropout": adapter.training.get("lora_dropout", 0.0),
            "keys": keys,
        },
        CARRIED_KEY: carried_json(adapter, facts),
    }
    with new_directory(path, force=context.force) as partial:
        write_safetensors(tensors, partial / WEIGHTS_FILE, {"format": "mlx"})
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check_module(
    path: str, module: LoraModule, adapter: Adapter, base: BaseFacts | None, problems: Problems
) -> None:
    first = next(iter(adapter.modules.values()))
    if (module.magnitude is None) != (first.magnitude is None):
        problems.add(path, "DoRA on all modules or none", "a mixture", "write two adapters")
    for name, tensor in module.tensors().items():
        if str(tensor.dtype).removeprefix("torch.") not in _DTYPES:
            problems.add(f"{path}.{name}", f"one of {', '.join(_DTYPES)}", str(tensor.dtype))
    if module.kind is not ModuleKind.EMBEDDING:
        return
    if module.magnitude is not None:
        problems.add(
            path, "plain LoRA on an embedding", "DoRA, which MLX normalises per token", _MERGE
        )
    if base is None:
        problems.add(
            path,
            "the base, to see whether its head is tied to this embedding",
            "none",
            "give --base",
        )
    elif base.tied:
        problems.add(
            path,
            "an embedding with a head of its own",
            "tied embeddings: MLX would adapt the head too, which PEFT does not",
            _MERGE,
        )


_MERGE = "merge it into the base and convert that"


def _padded(field: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """Return MLX's orientation of a tensor, with zeros up to the common rank."""
    from torch.nn.functional import pad

    if field == "magnitude":
        return tensor.detach().cpu().flatten().contiguous()
    turned = tensor.detach().cpu().T
    missing = rank - turned.shape[1 if field == "lora_A" else 0]
    widths = (0, missing) if field == "lora_A" else (0, 0, 0, missing)
    return pad(turned, widths).contiguous()


def _scale(config: dict[str, Any], problems: Problems) -> float:
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < 1e12:
        problems.add(
            f"{CONFIG_FILE}: lora_parameters.scale",
            "a number",
            json.dumps(scale, default=repr)[:80],
            "mlx-lm writes it when it trains",
        )
        return 1.0
    return float(scale)


def _check_fine_tune_type(
    config: dict[str, Any], modules: dict[str, LoraModule], problems: Problems
) -> None:
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        problems.add(f"{CONFIG_FILE}: fine_tune_type", "lora or dora", repr(kind)[:80])
    for path, module in modules.items():
        if (module.magnitude is not None) != (kind == "dora"):
            got = "no m" if module.magnitude is None else "m"
            problems.add(path, f"what fine_tune_type {kind!r} says", got, "fetch it again")


def _embeds(module_path: str) -> bool:
    return module_path.rpartition(".")[2] in ("embed_tokens", "wte", "word_embeddings")


def _base(context: FormatContext, recorded: str | None) -> BaseFacts | None:
    directory = context.base_directory(recorded)
    return None if directory is None else read_base_facts(directory)


FORMAT = AdapterFormat(
    name="mlx",
    summary=f"mlx-lm's directory ({CONFIG_FILE}, {WEIGHTS_FILE})",
    holds=_HOLDS,
    detect=detect,
    read=read,
    write=write,
)
