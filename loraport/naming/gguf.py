"""llama.cpp's names: architectures, and base tensors such as ``blk.0.attn_q.weight``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

LORA_A = ".lora_a"
LORA_B = ".lora_b"
EMBEDDING_TENSOR = "token_embd.weight"


@dataclass(frozen=True)
class GgufArchitecture:
    """How llama.cpp sees an architecture of transformers.

    Attributes:
        name: ``general.architecture``.
        permuted: The rows of the query and key projections are stored in the order of
            interleaved rotary embeddings rather than of halves (llama.cpp's ``permute``).
    """

    name: str
    permuted: bool = False


# transformers' model_type → llama.cpp's architecture, for those whose base tensors correspond
# one to one. Others (packed experts, renamed or split weights) are refused rather than guessed.
_ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture("llama", permuted=True),
    "mistral": GgufArchitecture("llama", permuted=True),
    "granite": GgufArchitecture("granite", permuted=True),
    "smollm3": GgufArchitecture("smollm3", permuted=True),
    "qwen2": GgufArchitecture("qwen2"),
    "qwen3": GgufArchitecture("qwen3"),
    "gemma": GgufArchitecture("gemma"),
    "gemma2": GgufArchitecture("gemma2"),
    "gemma3_text": GgufArchitecture("gemma3"),
    "phi3": GgufArchitecture("phi3"),
    "starcoder2": GgufArchitecture("starcoder2"),
    "olmo2": GgufArchitecture("olmo2"),
    "gpt2": GgufArchitecture("gpt2"),
}
_PREFIXES = ("", "model.", "transformer.")  # a bare body (LlamaModel) lacks its model's prefix


def gguf_architecture(model_type: str) -> GgufArchitecture | None:
    """Return llama.cpp's architecture for one of transformers, ``None`` where it is unknown."""
    return _ARCHITECTURES.get(model_type)


def known_model_types() -> str:
    """Return the architectures that `gguf_architecture` knows, for messages."""
    return ", ".join(sorted(_ARCHITECTURES))


def gguf_tensors(
    module_paths: Iterable[str], architecture: GgufArchitecture, layers: int
) -> dict[str, str]:
    """Return module path → base tensor; modules that llama.cpp has no tensor for are left out.

    Args:
        module_paths: Paths in transformers' model.
        architecture: The base's architecture.
        layers: How many layers the base has.

    >>> gguf_tensors(["model.layers.0.self_attn.q_proj"], GgufArchitecture("llama"), 1)
    {'model.layers.0.self_attn.q_proj': 'blk.0.attn_q.weight'}
    """
    import gguf

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture.name], layers)
    tensors = {}
    for path in module_paths:
        found = (names.get_name(prefix + path) for prefix in _PREFIXES)
        base_name = next((name for name in found if name is not None), None)
        if base_name is not None:
            tensors[path] = f"{base_name}.weight"
    return tensors


def is_permuted_query(tensor: str) -> bool:
    """Tell whether a base tensor is a query projection."""
    return tensor.endswith(".attn_q.weight")


def is_permuted_key(tensor: str) -> bool:
    """Tell whether a base tensor is a key projection."""
    return tensor.endswith(".attn_k.weight")
