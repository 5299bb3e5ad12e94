"""Tiny models and every adapter variant that PEFT makes for them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 61,
}
TINY["initializer_range"] = 0.2  # large enough that every change shows in the outputs


class ConvNet(torch.nn.Module):
    """1-d, 2-d, 1x1 and grouped convolutions, an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(17, 6)
        self.conv1d = torch.nn.Conv1d(6, 10, 3, padding=1, stride=2, bias=False)
        self.conv2d = torch.nn.Conv2d(1, 8, (3, 2), padding=1)
        self.pointwise = torch.nn.Conv2d(8, 12, 1)
        self.grouped = torch.nn.Conv2d(12, 6, 3, groups=2)
        self.head = torch.nn.Linear(6, 5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1d(self.embed(input_ids).transpose(1, 2))
        hidden = self.pointwise(torch.tanh(self.conv2d(hidden.unsqueeze(1))))
        return self.head(torch.tanh(self.grouped(hidden)).mean((2, 3)))


class NormNet(ConvNet):
    """The same, with batch norms, one as it is made and one that has seen data."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(10)
        self.seen = torch.nn.BatchNorm2d(12)
        self.seen.running_mean += torch.linspace(-1, 1, 12)
        self.seen.running_var += torch.linspace(0, 2, 12)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.conv1d(self.embed(input_ids).transpose(1, 2)))
        hidden = self.seen(self.pointwise(torch.tanh(self.conv2d(hidden.unsqueeze(1)))))
        return self.head(torch.tanh(self.grouped(hidden)).mean((2, 3)))


class Mixture(torch.nn.Module):
    """Two parameters of matrices, beside modules of the same owner."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = torch.nn.Parameter(torch.randn(3, 7, 5))
        self.w2 = torch.nn.Parameter(torch.randn(6, 7))
        self.gate = torch.nn.Linear(5, 3)
        self.inner = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
        self.bias = torch.nn.Parameter(torch.randn(6))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        share = torch.softmax(self.gate(hidden) * self.inner(hidden), 1)
        return torch.einsum("be,eod,bd->bo", share, self.w1, hidden) @ self.w2.T + self.bias


class MixtureNet(ConvNet):
    """The same with a mixture behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.mixture = Mixture()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.mixture(super().forward(input_ids))


def llama(tie: bool = False, attention_bias: bool = False) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            **TINY,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tie,
            attention_bias=attention_bias,
        )
    )


def gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 24, "n_head": 2, "n_layer": 2, "vocab_size": 53, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def bert() -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**TINY, num_attention_heads=4, num_labels=3))


def t5() -> torch.nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, vocab_size=61, decoder_start_token_id=0))


def mixtral() -> torch.nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            **TINY,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )


def qwen_moe() -> torch.nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **TINY,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=4,
            head_dim=8,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
        )
    )


@dataclass(frozen=True)
class Case:
    """One model and one adapter configuration."""

    model: Callable[[], torch.nn.Module]
    options: dict[str, Any] = field(default_factory=dict)


_ATTENTION = ["q_proj", "v_proj", "down_proj"]
_BERT = ["query", "dense"]
_CONVS = ["conv1d", "conv2d", "pointwise"]

CASES: dict[str, Case] = {
    "plain": Case(llama, {"target_modules": _ATTENTION, "r": 4, "lora_alpha": 7}),
    "rslora": Case(llama, {"target_modules": _ATTENTION, "r": 4, "use_rslora": True}),
    "patterns": Case(
        llama,
        {
            "target_modules": _ATTENTION,
            "r": 4,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, r"model\.layers\.\d\.mlp.*": 5},
            "alpha_pattern": {"q_proj": 3, "layers.1.self_attn.q_proj": 11},
        },
    ),
    "rslora_patterns": Case(
        llama,
        {
            "target_modules": _ATTENTION,
            "use_rslora": True,
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 3},
            "alpha_pattern": {"v_proj": 5},
        },
    ),
    "dora": Case(llama, {"target_modules": _ATTENTION, "r": 4, "use_dora": True}),
    "lora_bias": Case(
        lambda: llama(attention_bias=True),
        {"target_modules": ["q_proj", "o_proj"], "r": 4, "lora_bias": True},
    ),
    "bias_lora_only": Case(bert, {"target_modules": _BERT, "r": 4, "bias": "lora_only"}),
    "bias_all": Case(bert, {"target_modules": ["query"], "r": 4, "bias": "all"}),
    "bert_classifier": Case(
        bert, {"target_modules": _BERT, "r": 4, "task_type": "SEQ_CLS", "use_rslora": True}
    ),
    "bert_dora": Case(bert, {"target_modules": ["query", "value"], "use_dora": True}),
    "conv1d_storage": Case(
        gpt2, {"target_modules": ["c_attn", "c_proj"], "r": 4, "fan_in_fan_out": True}
    ),
    "conv1d_storage_dora": Case(
        gpt2, {"target_modules": ["c_attn"], "r": 4, "fan_in_fan_out": True, "use_dora": True}
    ),
    "conv1d_storage_and_head": Case(
        gpt2, {"target_modules": ["c_attn", "attn.c_proj", "lm_head"], "r": 4}
    ),
    "embedding": Case(llama, {"target_modules": ["embed_tokens", "q_proj"], "r": 4}),
    "embedding_and_head": Case(llama, {"target_modules": ["embed_tokens", "lm_head"], "r": 4}),
    "embedding_dora": Case(llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tied_embedding": Case(lambda: llama(tie=True), {"target_modules": ["embed_tokens"], "r": 4}),
    "tied_head": Case(lambda: llama(tie=True), {"target_modules": ["lm_head"], "r": 4}),
    "tied_together": Case(
        lambda: llama(tie=True),
        {"target_modules": ["embed_tokens"], "r": 4, "ensure_weight_tying": True},
    ),
    "modules_to_save": Case(
        llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}
    ),
    "tied_modules_to_save": Case(
        lambda: llama(tie=True), {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    ),
    "tokens": Case(llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 60]}),
    "tied_tokens": Case(
        lambda: llama(tie=True), {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}
    ),
    "conv": Case(ConvNet, {"target_modules": [*_CONVS, "head"], "r": 4, "lora_alpha": 3}),
    "conv_dora": Case(ConvNet, {"target_modules": _CONVS, "r": 4, "use_dora": True}),
    "conv_bias": Case(ConvNet, {"target_modules": ["conv2d"], "r": 4, "lora_bias": True}),
    "experts": Case(
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "r": 3,
            "rank_pattern": {"experts.gate_up_proj": 2},
        },
    ),
    "experts_rslora": Case(
        qwen_moe,
        {
            "target_modules": [],
            "target_parameters": ["mlp.experts.down_proj", "q_proj.weight"],
            "r": 3,
            "use_rslora": True,
            "alpha_pattern": {"layers.1.mlp.experts.down_proj": 20},
        },
    ),
    "parameters_beside_modules": Case(
        MixtureNet,
        {
            "target_modules": r"mixture\.gate|head",
            "target_parameters": ["mixture.w1", "w2"],
            "modules_to_save": ["inner.0", "inner.1"],
            "bias": "all",
            "r": 3,
            "rank_pattern": {"mixture.gate": 2},
        },
    ),
    # What random combinations of options found to go wrong at first.
    "tied_tokens_and_head": Case(
        lambda: llama(tie=True),
        {"target_modules": ["lm_head"], "r": 3, "trainable_token_indices": [1, 5]},
    ),
    "tied_tokens_of_the_head": Case(
        lambda: llama(tie=True),
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 5]}},
    ),
    "tokens_of_both_stacks": Case(
        t5, {"target_modules": ["q"], "r": 3, "trainable_token_indices": {"embed_tokens": [1, 3]}}
    ),
    "rank_one": Case(llama, {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "r": 1}),
    "parameter_of_conv1d": Case(
        gpt2, {"target_modules": [], "target_parameters": ["c_proj.weight"], "r": 3}
    ),
    "parameters_by_name_alone": Case(
        qwen_moe,
        {"target_modules": "all-linear", "r": 2, "target_parameters": ["down_proj"]},
    ),
    "saved_module_with_every_bias": Case(
        bert,
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier", "pooler"]},
    ),
    "router": Case(mixtral, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    "batch_norms": Case(
        NormNet, {"target_modules": ["conv2d", "head"], "modules_to_save": ["norm", "seen"], "r": 3}
    ),
    "conv_grouped": Case(ConvNet, {"target_modules": ["grouped"], "r": 4}),
}
UNMERGEABLE = frozenset({"conv_grouped"})  # a base kernel cannot hold its update; PEFT refuses too


def inputs() -> torch.Tensor:
    """Token ids for every model, all rows that any case trains among them."""
    return torch.tensor([[1, 5, 3, 9, 2, 16, 7, 11], [4, 8, 0, 1, 5, 12, 10, 6]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Outputs of a model in evaluation mode."""
    model.eval()
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    more = {"decoder_input_ids": inputs().flip(0)} if decodes else {}
    with torch.no_grad():
        result = model(input_ids=inputs(), **more)
    return result if isinstance(result, torch.Tensor) else result.logits


@dataclass
class Made:
    """A base and an adapter that PEFT made and saved."""

    case: Case
    base: torch.nn.Module
    peft_model: Any
    path: Path

    def fresh_base(self) -> torch.nn.Module:
        return copy.deepcopy(self.base)


def make(name: str, path: Path, seed: int = 0) -> Made:
    """Make one case: a base, and an adapter all of whose tensors are away from their start."""
    return make_case(CASES[name], path, seed)


def make_case(case: Case, path: Path, seed: int = 0, base: torch.nn.Module | None = None) -> Made:
    from peft import LoraConfig, get_peft_model

    if base is None:
        torch.manual_seed(0)
        base = case.model().eval()
        with torch.no_grad():
            for parameter_name, parameter in base.named_parameters():
                if parameter_name.endswith("bias"):
                    parameter.normal_(0, 0.1)
    torch.manual_seed(seed + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**case.options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    spread = parameter.std() if parameter.numel() > 1 else parameter.abs().sum()
                    parameter.add_(torch.randn_like(parameter) * (0.2 + 0.5 * spread))
            for buffer_name, buffer in model.named_buffers():
                if "modules_to_save" in buffer_name:  # the statistics of a batch norm
                    moved = torch.rand(buffer.shape) + 0.5 if buffer.is_floating_point() else 7
                    buffer.add_(moved)
        model.save_pretrained(path)
    return Made(case, base, model.eval(), path)


def load_with_peft(base: torch.nn.Module, path: Path) -> torch.nn.Module:
    """Load an adapter with PEFT, every warning about missing or unexpected keys an error."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing.*keys.*")
        return PeftModel.from_pretrained(base, path).eval()


def merge_with_peft(made: Made) -> torch.nn.Module:
    """Merge with PEFT's own code, from what the adapter's files say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_with_peft(made.fresh_base(), made.path).merge_and_unload().eval()
