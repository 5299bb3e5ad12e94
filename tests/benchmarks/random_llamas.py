"""Language models with random weights in the shapes of real ones: made in place, nothing is read.

A step takes as long and as much memory with random weights as with trained ones. Weights are drawn
layer by layer on the device, and quantized there at once, so that making a model never takes more
memory than having it.
"""

import torch
from torch import nn

from loraport.parity.prompts import PROMPTS
from loraport.training.base.quantized_base import quantize_linears

# As in the models' own config.json, but for the first two.
SHAPES = {
    # Next to no arithmetic: a step takes what the host needs to say what is to be computed, which
    # is what a GPU waits for where a model is small.
    "narrow": {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
}


def config_of(shape):
    from transformers import LlamaConfig

    return LlamaConfig(**SHAPES[shape])


def random_llama(shape, device, storage="float32", deviation=0.02):
    """Return a Llama in evaluation mode.

    Args:
        shape: One of `SHAPES`.
        device: Where its weights are drawn.
        storage: ``float32``, ``bfloat16`` or ``nf4`` (what is not quantized is bfloat16 then).
        deviation: Of the weights.
    """
    from transformers import LlamaForCausalLM

    config = config_of(shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(torch.float32 if storage == "float32" else torch.bfloat16)
    torch.manual_seed(0)
    for layer in model.model.layers:
        _draw(layer, device, deviation)
        if storage == "nf4":
            quantize_linears(layer, "nf4", torch.device(device))
    # Its frequencies are computed, not drawn.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    for part in (model.model.embed_tokens, model.model.norm, model.lm_head):
        _draw(part, device, deviation)
    model.tie_weights()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model.eval()


def save_random_base(shape, directory):
    """Save a model with a tokenizer that knows the prompts of the parity protocol."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPES["tiny"]["vocab_size"] if shape == "tiny" else 2000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs.train_from_iterator(PROMPTS * 2, trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, **special)
    # As wide as a trained model's weights: adapters then change the outputs about as much.
    model = random_llama(shape, "cpu", deviation=0.06)
    for name in ("bos", "eos", "pad"):
        setattr(model.config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@torch.no_grad()
def _draw(part, device, deviation):
    part.to_empty(device=device)
    for parameter in part.parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            parameter.normal_(std=deviation)
