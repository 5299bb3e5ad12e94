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


def builds(architecture: str, config: Mapping[str, Any]) -> bool:
    """Tell whether a model is the builder's.

    It leaves out without a word that some of OLMo's keep queries, keys and values within bounds,
    that some of Phi's norm queries and keys, the biases of Nemotron's MLP and Granite 4's experts,
    and knows neither Granite's recurrent layers nor rotations of two tables but Phi's.

    Args:
        architecture: A class of transformers.
        config: The model's ``config.json``.
    """
    if architecture not in _BUILT or config.get("clip_qkv") is not None:
        return False
    rotation = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "longrope" in (rotation.get("rope_type"), rotation.get("type")):
        return architecture.startswith("Phi")
    if architecture == "PhiForCausalLM":
        return not config.get("qk_layernorm")
    if architecture == "NemotronForCausalLM":
        return not config.get("mlp_bias")
    if architecture == "GraniteMoeHybridForCausalLM":
        kinds = set(config.get("layer_types") or ["mamba"])
        return kinds <= _GRANITE_ATTENTION and not config.get("num_local_experts")
    return True


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
