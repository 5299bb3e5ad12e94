"""Write a Llama, Qwen2 or GPT-2 as an F32 GGUF file, after llama.cpp's rules, for the tests."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
}
_CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # stored [in, out]


def write_gguf_base(
    model: PreTrainedModel,
    path: Path,
    quantized: str | None = None,
    fields: Mapping[str, str | float | int] | None = None,
    tables: Mapping[str, np.ndarray] | None = None,
    name: str | None = None,
) -> Path:
    """Write a model; its matrices quantized where a type of gguf's is named.

    Fields of its architecture's and tables beside its weights are added where they are given.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    if name is not None:
        writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for key, value in (fields or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        add[type(value)](f"{config.model_type}.{key}", value)
    for name, table in (tables or {}).items():
        writer.add_tensor(name, table)
    writer.add_vocab_size(config.vocab_size)
    add_vocabulary(writer, config.vocab_size)
    heads = {"q_proj": config.num_attention_heads}
    heads["k_proj"] = getattr(config, "num_key_value_heads", config.num_attention_heads)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.float().numpy()
        if name.endswith(_CONV1D):
            weight = weight.T
        for projection, count in heads.items():
            # llama.cpp stores Llama's heads for interleaved rotary embeddings, Qwen2's as they are.
            if config.model_type == "llama" and name.endswith(f"{projection}.weight"):
                rows, columns = weight.shape
                halves = weight.reshape(count, 2, rows // count // 2, columns)
                weight = halves.swapaxes(1, 2).reshape(rows, columns)
        weight = np.ascontiguousarray(weight)
        if quantized is None or weight.ndim < 2:
            writer.add_tensor(_tensor_name(name), weight)
            continue
        kind = gguf.GGMLQuantizationType[quantized]
        writer.add_tensor(_tensor_name(name), gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_decoder(model_type: str, **settings: object) -> PreTrainedModel:
    """A model with grouped-query attention, ``k``, ``v`` and the MLP not square."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    if model_type == "gpt2":
        # 1024 positions: transformers' own reader of such files assumes as many.
        sizes = {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 320, "n_positions": 1024}
        ends = {"bos_token_id": 1, "eos_token_id": 2}
        config = AutoConfig.for_model(model_type, **sizes, **ends, initializer_range=0.1)
        return AutoModelForCausalLM.from_config(config).eval()
    config = AutoConfig.for_model(
        model_type,
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=False,
        **settings,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def _tensor_name(name: str) -> str:
    if name == "transformer.wpe.weight":
        return "position_embd.weight"
    if name.startswith("transformer.ln_f."):
        return f"output_norm.{name.rpartition('.')[2]}"
    if name in ("model.embed_tokens.weight", "transformer.wte.weight"):
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    if name == "lm_head.weight":
        return "output.weight"
    _, _, layer, rest = name.split(".", 3)
    module, _, leaf = rest.rpartition(".")
    return f"blk.{layer}.{_NAMES[module]}.{leaf}"


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Bytes and filler: the tests feed token numbers, but llama.cpp wants a tokenizer."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    tokens += [f"▁word{number}" for number in range(size - len(tokens))]
    types += [gguf.TokenType.NORMAL] * (size - len(types))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
