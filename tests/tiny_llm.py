"""A tiny decoder language model with a real tokenizer, and adapters that PEFT makes for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft_cases import Case, make_case

TEXTS = (
    "The harbour keeps its light on all night long.",
    "Ships swap their cargo: boxes, barrels and crates of tea.",
    "Größe, naïve, São Paulo, 東京, Ελλάδα, 🚢🚢🚢 and ⚓.",
    "2, 4, 8, 16, 32, 64, 128 and so on.",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
VOCABULARY = 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # what the attention operator takes; makes q_proj and o_proj non-square
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large enough that every change shows in the outputs
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
# Phi-3 has no head size of its own, and its rotation covers the whole head.
PHI3 = {key: value for key, value in SIZES.items() if key != "head_dim"} | {
    "hidden_size": 64,
    "original_max_position_embeddings": SIZES["max_position_embeddings"],
}
# Texts of more tokens than its original context are rotated by the long factors as a whole.
LONG_PHI3 = PHI3 | {
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 20,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + number / 8 for number in range(8)],
        "long_factor": [2.0 + number for number in range(8)],
        "attention_factor": 1.5,  # not the one of the contexts' ratio
        "short_mscale": 1.25,  # which PhiMoE alone reads
    },
}
# The builder rounds Gemma's embedding scale, sqrt(hidden size), to two decimals: 8 is exact.
GEMMA = SIZES | {"hidden_size": 64}
# Every kind of linear module: packed q/k/v as a whole.
ALL_LINEAR = Case(lambda: None, {"target_modules": "all-linear", "r": 4, "lora_alpha": 6})
# A part of packed q/k/v, ranks that differ, another scaling.
SOME_RANKS = Case(
    lambda: None,
    {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "r": 6,
        "lora_alpha": 4,
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 2},
    },
)


def tokenizer() -> Any:
    """Train a byte-level BPE tokenizer: every text has tokens, rare characters several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_base(directory: Path, model: torch.nn.Module | None = None, seed: int = 0) -> Path:
    """Save a model with the tokenizer in the Hugging Face layout; a Llama unless given."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if model is None:
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def save_adapter(base: Path, case: Case, out: Path, seed: int = 0) -> Path:
    """Save an adapter of a base, all its tensors away from their start."""
    from loraport.base.loading import load_model

    make_case(case, out, seed, base=load_model(str(base)))
    return out


def peft_model(base: Path, adapter: Path) -> Any:
    """Return PEFT's model of a base and an adapter."""
    from peft_cases import load_with_peft

    from loraport.base.loading import load_model

    return load_with_peft(load_model(str(base)), adapter)
