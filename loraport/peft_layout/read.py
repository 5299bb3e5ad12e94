"""Read an adapter in PEFT's layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.adapter import BATCH_COUNTER, Adapter, LoraModule, ModuleKind, Replacement
from loraport.base.checkpoint import Checkpoint
from loraport.counts import counted
from loraport.errors import LoraportError, Problems
from loraport.fingerprint import BaseFingerprint
from loraport.naming import Part, PeftKey, parse_peft_key, peft_key, peft_parameter_key, weight_name
from loraport.peft_layout.config import LoraSettings, read_config
from loraport.peft_layout.expert_keys import WrappedParameters, wrapped_parameters

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
FINGERPRINT_KEY = "loraport.base_fingerprint"
_ATTENTION_OUTPUT = ".base_layer.out_proj"  # inside PEFT's wrapper of an attention of torch's


def is_peft(path: Path | str) -> bool:
    """Tell whether ``path`` is a directory in PEFT's layout."""
    return (Path(path) / CONFIG_FILE).is_file()


def read_peft(path: Path | str, *, changed_base: bool = False) -> Adapter:
    """Read an adapter directory.

    Targets are taken from the tensor keys, not from ``target_modules``. Every tensor must be
    claimed, be finite and have the shape its partners and the configuration ask for.

    Args:
        path: Directory with ``adapter_config.json`` and ``adapter_model.safetensors`` (or
            ``adapter_model.bin``, read without executing pickled code).
        changed_base: Accept adapters of initialisations that change the base weights; see
            `loraport.peft_layout.initial`.

    Raises:
        LoraportError: All problems of the adapter at once.
    """
    path = Path(path)
    settings = read_config(path / CONFIG_FILE, changed_base=changed_base)
    tensors, metadata = _read_tensors(path)
    return adapter_of_contents(settings, tensors, metadata.get(FINGERPRINT_KEY), path)


def adapter_of_contents(
    settings: LoraSettings,
    tensors: Mapping[str, torch.Tensor],
    fingerprint: str | None,
    path: Path,
) -> Adapter:
    """Return the adapter that a configuration and tensors by PEFT key make up.

    Args:
        settings: The configuration.
        tensors: The tensors.
        fingerprint: The stored fingerprint of the base, as JSON.
        path: Where all this is from, for messages.

    Raises:
        LoraportError: All problems of the adapter at once.
    """
    problems = Problems()
    parts: dict[str, dict[Part, torch.Tensor]] = defaultdict(dict)
    replacements: dict[str, Replacement] = {}
    counters: dict[str, torch.Tensor] = {}
    keys = {key: parse_peft_key(key) for key in tensors}
    wrappers = _wrappers(keys.values(), settings, problems)
    for key, tensor in tensors.items():
        parsed = keys[key]
        if parsed is not None and _is_counter(parsed, tensor):
            counters[wrappers.in_model(parsed.parameter)] = tensor
            continue
        _check_values(key, tensor, problems)
        if parsed is None:
            problems.add(key, "a key of PEFT's LoRA layout", f"a tensor {_shape(tensor)}")
        elif parsed.part is None:
            if not _is_own_copy(parsed.parameter, tensor, tensors):
                name = wrappers.in_model(parsed.parameter)
                _replace(replacements, name, Replacement(tensor), key, problems)
        elif parsed.part is Part.TOKEN_ROWS:
            module_path = wrappers.in_model(parsed.module_path)
            rows = _token_rows(module_path, tensor, settings, problems)
            name = weight_name(module_path)
            _replace(replacements, name, Replacement(tensor, rows), key, problems)
        else:
            parts[parsed.module_path][parsed.part] = tensor
    for module_path in [path for path in parts if path.endswith(_ATTENTION_OUTPUT)]:
        problems.add(
            module_path.removesuffix(_ATTENTION_OUTPUT),
            "a module with one weight",
            "a torch.nn.MultiheadAttention, whose output projection PEFT 0.21 updates twice",
            "merge it with PEFT",
        )
    modules = {}
    for module_path, found in parts.items():
        bare = wrappers.parameters.get(module_path)
        target = bare or wrappers.in_model(module_path)
        module = _module(target, found, settings, problems, bare is not None)
        if module is not None:
            modules[target] = module
    if not parts and not replacements:
        problems.add(str(path), "adapter tensors", "none")
    problems.raise_if_any(f"adapter {path} cannot be read")
    return Adapter(
        modules=modules,
        replacements=replacements,
        base_model=settings.base_model,
        base_fingerprint=BaseFingerprint.from_json(fingerprint) if fingerprint else None,
        training=settings.training,
        counters=counters,
    )


def _wrappers(
    keys: Iterable[PeftKey | None], settings: LoraSettings, problems: Problems
) -> WrappedParameters:
    paths = {key.module_path for key in keys if key and key.part not in (None, Part.TOKEN_ROWS)}
    targets = settings.training.get("target_modules")
    return wrapped_parameters(sorted(paths), settings.target_parameters, targets, problems)


def _is_counter(parsed: PeftKey, tensor: torch.Tensor) -> bool:
    name = parsed.parameter.rpartition(".")[2]
    return name == BATCH_COUNTER and tensor.dim() == 0 and not tensor.is_floating_point()


def _is_own_copy(parameter: str, tensor: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether a stored bias of a module to save is one that counts for nothing.

    With ``bias="all"`` PEFT saves the biases of such a module three times: as the module's, as
    those of its wrapped copy, and as those of the original, which is switched off.
    """
    if ".original_module." in parameter:
        return True
    module, marker, inside = parameter.partition(".modules_to_save.")
    # Deeper inside the module the adapter's name may have stayed in the key.
    names = (inside, inside.partition(".")[2]) if marker else ()
    saved = [tensors.get(peft_parameter_key(f"{module}.{name}")) for name in names]
    return any(found is not None and found.equal(tensor) for found in saved)


def _replace(
    replacements: dict[str, Replacement],
    parameter: str,
    replacement: Replacement,
    key: str,
    problems: Problems,
) -> None:
    if parameter in replacements:
        together = _with_rows(replacements[parameter], replacement)
        if together is None:
            problems.add(key, f"one tensor for {parameter}", "a second one")
        replacement = together or replacement
    replacements[parameter] = replacement


def _with_rows(one: Replacement, other: Replacement) -> Replacement | None:
    """Return a saved embedding with its trained rows, which PEFT saves beside it.

    Returns:
        The whole of it, or ``None`` where the two are nothing of the kind.
    """
    whole, trained = (other, one) if one.rows is not None else (one, other)
    rows = list(trained.rows or ())
    if whole.rows is not None or not rows or whole.tensor.dim() != 2:
        return None
    if max(rows) >= len(whole.tensor) or trained.tensor.shape != (len(rows), whole.tensor.shape[1]):
        return None
    tensor = whole.tensor.clone()
    tensor[rows] = trained.tensor.to(tensor.dtype)
    return Replacement(tensor)


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    weights = path / WEIGHTS_FILE
    if weights.is_file():
        checkpoint = Checkpoint(weights)
        return {name: checkpoint.load(name) for name in checkpoint}, checkpoint.metadata
    pickled = path / PICKLED_FILE
    if not pickled.is_file():
        stem, _, kind = WEIGHTS_FILE.rpartition(".")
        parts = sorted(part.name for part in path.glob(f"{stem}-*-of-*.{kind}"))
        many = f"parts of it ({', '.join(parts)}); put their tensors into one"
        got = many if parts else "no such"
        raise LoraportError(f"adapter {path}: expected {WEIGHTS_FILE}, got {got} file")
    import pickle

    import torch

    try:
        loaded = torch.load(pickled, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        # torch's own text advises to load it without this check.
        raise LoraportError(
            f"{pickled}: expected tensors and nothing else, got a file that is damaged or holds "
            "other objects, whose code is not run here; fetch it again, or save the adapter as "
            f"{WEIGHTS_FILE}"
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(value, torch.Tensor) for value in loaded.values()
    ):
        raise LoraportError(f"{pickled}: expected a dictionary of tensors")
    return loaded, {}


def _module(
    path: str,
    found: dict[Part, torch.Tensor],
    settings: LoraSettings,
    problems: Problems,
    bare_parameter: bool,
) -> LoraModule | None:
    embedding = Part.EMBEDDING_A in found or Part.EMBEDDING_B in found
    part_a, part_b = (
        (Part.EMBEDDING_A, Part.EMBEDDING_B) if embedding else (Part.LORA_A, Part.LORA_B)
    )
    complete = True
    for part in (part_a, part_b):
        if part not in found:
            problems.add(peft_key(path, part), "the partner of the other matrix", "no such tensor")
            complete = False
    if not complete:
        return None
    lora_a, lora_b = found[part_a], found[part_b]
    if lora_a.dim() < 2 or lora_b.dim() < 2:
        problems.add(path, "matrices A and B", f"A {_shape(lora_a)} and B {_shape(lora_b)}")
        return None
    experts = 1
    if bare_parameter and lora_a.shape[0] % settings.ranks.rank(path) == 0:
        experts = lora_a.shape[0] // settings.ranks.rank(path)
    _check_shapes(path, found, part_a, part_b, settings, problems, experts)
    if bare_parameter:
        return LoraModule(
            kind=ModuleKind.EXPERTS,
            lora_A=lora_a,
            lora_B=lora_b,
            alpha=settings.ranks.alpha(path),
            use_rslora=settings.use_rslora,
            experts=experts,
        )
    kind = ModuleKind.EMBEDDING if embedding else ModuleKind.LINEAR
    return LoraModule(
        kind=ModuleKind.CONV if lora_a.dim() > 2 else kind,
        lora_A=lora_a,
        lora_B=lora_b,
        alpha=settings.ranks.alpha(path),
        use_rslora=settings.use_rslora,
        fan_in_fan_out=settings.fan_in_fan_out and not embedding,
        lora_B_bias=found.get(Part.LORA_B_BIAS),
        magnitude=found.get(Part.MAGNITUDE),
    )


def _check_shapes(
    path: str,
    found: dict[Part, torch.Tensor],
    part_a: Part,
    part_b: Part,
    settings: LoraSettings,
    problems: Problems,
    experts: int,
) -> None:
    lora_a, lora_b = found[part_a], found[part_b]
    rank = settings.ranks.rank(path) * experts
    if lora_a.shape[0] != rank:
        problems.add(
            peft_key(path, part_a),
            f"{rank} rows, the rank that {CONFIG_FILE} gives this module",
            _shape(lora_a),
            "r and rank_pattern must fit the tensors",
        )
    grouped = lora_a.dim() > 2 and lora_b.shape[1] > 0 and lora_a.shape[0] % lora_b.shape[1] == 0
    if lora_b.shape[1] != lora_a.shape[0] and not grouped:
        problems.add(
            peft_key(path, part_b),
            f"{counted(lora_a.shape[0], 'column')}, the rank of A",
            _shape(lora_b),
        )
    if lora_b[0, 0].numel() != 1 or lora_b.dim() != lora_a.dim():
        problems.add(peft_key(path, part_b), "a 1x1 kernel of A's dimensions", _shape(lora_b))
    _check_vector(path, Part.MAGNITUDE, found, settings.use_dora, lora_b.shape[0], problems)
    _check_vector(path, Part.LORA_B_BIAS, found, settings.lora_bias, lora_b.shape[0], problems)


def _check_vector(
    path: str,
    part: Part,
    found: dict[Part, torch.Tensor],
    wanted: bool,
    length: int,
    problems: Problems,
) -> None:
    tensor = found.get(part)
    if tensor is None:
        if wanted:
            problems.add(peft_key(path, part), f"it, as {CONFIG_FILE} says", "no such tensor")
    elif not wanted:
        problems.add(peft_key(path, part), f"none, as {CONFIG_FILE} says", _shape(tensor))
    elif tensor.numel() != length:
        problems.add(peft_key(path, part), f"[{length}]", _shape(tensor))


def _token_rows(
    path: str, tensor: torch.Tensor, settings: LoraSettings, problems: Problems
) -> tuple[int, ...]:
    rows = settings.token_indices.get("", ())
    for name, indices in settings.token_indices.items():
        if name and (path == name or path.endswith("." + name)):
            rows = indices
    if tensor.dim() != 2 or tensor.shape[0] != len(rows):
        problems.add(
            peft_key(path, Part.TOKEN_ROWS),
            f"{counted(len(rows), 'row')}, as trainable_token_indices lists",
            _shape(tensor),
        )
    return rows


def _check_values(key: str, tensor: torch.Tensor, problems: Problems) -> None:
    if not tensor.is_floating_point():
        problems.add(key, "a floating-point tensor", str(tensor.dtype))
    elif not tensor.float().isfinite().all():
        problems.add(key, "finite values", "NaN or infinity", "the training diverged; train again")


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))
