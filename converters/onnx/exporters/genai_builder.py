"""Export a decoder language model with ONNX Runtime GenAI's model builder.

The builder makes the base graph: fused attention, KV cache, packed QKV, int4 weights. It runs
in a process of its own, so its memory goes back when it is done and its prints stay apart.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.onnx.exporters import mended_builder
from loraport.errors import LoraportError, last_words

# Precisions by provider, as far as version 0.18's graphs run: fp32 for CUDA lacks the producers of
# its cache outputs, fp16 for the CPU fails on a wrong shape annotation as soon as a second prompt
# has another length. bf16 runs on CUDA alone, so its bundles have no golden outputs.
PRECISIONS = {"cpu": ("fp32", "int8", "int4"), "cuda": ("fp16", "bf16", "int8", "int4")}


# Those that version 0.18 makes as they are, of the decoders that it knows. LFM2's convolutions have
# caches of their own, which no runner here feeds.
_BUILT = frozenset(
    f"{name}ForCausalLM"
    for name in (
        *("Ernie4_5", "Gemma", "Gemma2", "Gemma3", "GptOss", "Granite", "GraniteMoeHybrid"),
        *("HunYuanDenseV1", "InternLM2", "Llama", "Mistral", "Nemotron", "Olmo", "Phi", "Phi3"),
        *("Phi3Small", "Phi3V", "Phi4MM", "PhiMoE", "Qwen2", "Qwen3", "SmolLM3"),
        "VideoChatFlashQwen",
    )
)
_GRANITE_ATTENTION = {"attention", "full_attention"}
_GRANITE_EXPERTS = 8  # where config.json does not say how many
_ACTIVATIONS = frozenset(
    {
        *("silu", "swish", "swiglu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
        *("gegelu", "geglu", "relu", "relu2"),
    }
)
# What transformers' classes have where config.json does not say: the size of a head, which is the
# hidden size's share of others, and how much of it is rotated, which others do as a whole.
_HEADS = {
    **{f"{name}ForCausalLM": 256 for name in ("Gemma", "Gemma2", "Gemma3")},
    **{f"{name}ForCausalLM": 128 for name in ("Ernie4_5", "Qwen3")},
    "GptOssForCausalLM": 64,
}
_ROTATED_PARTS = {"NemotronForCausalLM": 0.5, "PhiForCausalLM": 0.5}
_ATTENTION_STEP = 16  # what GroupQueryAttention takes heads and rotations in multiples of


def builds(architecture: str, config: Mapping[str, Any], precision: str = "fp32") -> bool:
    """Tell whether a model is the builder's.

    Args:
        architecture: A class of transformers.
        config: The model's ``config.json``.
        precision: What the graph stores.
    """
    return why_not_built(architecture, config, precision) is None


def why_not_built(
    architecture: str, config: Mapping[str, Any], precision: str = "fp32"
) -> str | None:
    """Say why a decoder is not the builder's: what it refuses or leaves out without a word.

    Args:
        architecture: A class of transformers.
        config: The model's ``config.json``.
        precision: What the graph stores.

    Returns:
        What the builder does not do, after its name; ``None`` where it makes the model as it is.
    """
    if architecture not in _BUILT:
        return f"does not know {architecture}"
    # It takes the codes of the experts from the files themselves.
    if (
        architecture == "GptOssForCausalLM"
        and precision == "int4"
        and not config.get("quantization_config")
    ):
        return f"makes {precision} experts of GPT-OSS from MXFP4 alone, and these are in floats"
    if config.get("clip_qkv") is not None:
        return "leaves out the bounds of queries, keys and values (clip_qkv)"
    rotation = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rotation, Mapping):
        rotation = {}
    kinds = (rotation.get("rope_type"), rotation.get("type"))
    if "longrope" in kinds and not architecture.startswith("Phi"):
        return "knows rotations of two tables (longrope) of Phi alone"
    if architecture == "PhiForCausalLM" and config.get("qk_layernorm"):
        return "leaves out the norms of queries and keys (qk_layernorm)"
    if architecture == "NemotronForCausalLM" and config.get("mlp_bias"):
        return "leaves out the biases of the MLP (mlp_bias)"
    if architecture == "GraniteMoeHybridForCausalLM":
        if config.get("num_local_experts", _GRANITE_EXPERTS):
            return "leaves out the experts (num_local_experts)"
        if not set(config.get("layer_types") or ["mamba"]) <= _GRANITE_ATTENTION:
            return "knows no recurrent layers"
    return _unknown_activation(config) or _odd_attention(architecture, config, rotation)


def _unknown_activation(config: Mapping[str, Any]) -> str | None:
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation is None or activation in _ACTIVATIONS:
        return None
    return f"does not know the activation {activation}"


def _odd_attention(
    architecture: str, config: Mapping[str, Any], rotation: Mapping[str, Any]
) -> str | None:
    """Say which size of attention's ONNX Runtime's operator refuses."""
    head = config.get("head_dim", _HEADS.get(architecture))
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if head is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        head = hidden // heads
    if not isinstance(head, int):  # transformers says what it expects
        return None
    if head % _ATTENTION_STEP:
        return f"attends by heads of a multiple of {_ATTENTION_STEP} alone (head_dim {head})"
    part = rotation.get("partial_rotary_factor") or config.get("partial_rotary_factor")
    part = part or _ROTATED_PARTS.get(architecture, 1.0)
    if isinstance(part, int | float) and int(head * part) % _ATTENTION_STEP:
        return (
            f"rotates a multiple of {_ATTENTION_STEP} of a head alone "
            f"(head_dim {head} * partial_rotary_factor {part})"
        )
    return None


def build_with_genai(base: Path, out: Path, *, precision: str, provider: str) -> None:
    """Write ``model.onnx`` with its data, ``genai_config.json`` and the tokenizer into ``out``.

    Args:
        base: Model directory in the Hugging Face layout.
        out: An existing, empty directory.
        precision: One of the provider's `PRECISIONS`.
        provider: ``"cpu"`` or ``"cuda"``.

    Raises:
        LoraportError: If the builder is not installed or fails; its last lines are shown.
    """
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise LoraportError(
            "export of a decoder language model: expected ONNX Runtime GenAI's model builder, "
            "got no such package; pip install 'loraport[genai]'"
        )
    # The builder's cache is for downloads of its own; ours are already local.
    cache = out / ".builder-cache"
    command = [sys.executable, "-m", mended_builder.__name__]
    command += ["--input", str(base), "--output", str(out), "--precision", precision]
    command += ["--execution_provider", provider, "--cache_dir", str(cache)]
    # A cache that keeps a window alone cannot be empty at first, nor be read by other programs.
    command += ["--extra_options", "windowed_kv_cache=false"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if cache.is_dir():
        cache.rmdir()
    if done.returncode != 0 or not (out / "model.onnx").is_file():
        lines = last_words(done.stderr)
        raise LoraportError(
            f"ONNX Runtime GenAI's model builder could not export {base} as {precision}:\n  "
            + "\n  ".join(lines)
        )
