"""Tiny models and data, as in the tests of training."""

import json

import pytest
import torch


def tiny_llama(seed=0, **more):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | more)).eval()


@pytest.fixture
def make_llama():
    return tiny_llama


@pytest.fixture
def rows():
    """Rows of unlike length, with prompts that do not count."""
    from loraport.training.data.batches import IGNORED, Row

    torch.manual_seed(3)
    made = []
    for index in range(14):
        length = 6 + index % 5
        tokens = [1 + (7 * index + 5 * at) % 11 for at in range(length)]
        made.append(Row(tuple(tokens), (IGNORED,) * 2 + tuple(tokens[2:])))
    return tuple(made)


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def data(write_jsonl):
    words = ["red", "green", "blue", "grey"]
    pairs = [(word, index) for index in range(4) for word in words]
    return write_jsonl([{"prompt": f"say {w} {i}", "completion": f" {w}!"} for w, i in pairs])
