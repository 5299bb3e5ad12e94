"""Tiny models and data, made on the spot."""

import json

import pytest
import torch

CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(chat_template=CHAT_TEMPLATE):
    """A byte tokenizer: what a token is can be counted by hand."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>", "<|pad|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=chat_template,
    )


def tiny_llama(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=272,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            eos_token_id=257,
            pad_token_id=258,
        )
    ).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def make_tokenizer():
    return build_tokenizer


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture
def fresh():
    """The same model as ``llama``, another object."""
    return tiny_llama()


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory):
    """A tiny base in the Hugging Face layout."""
    directory = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def chat(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture
def chat_data(write_jsonl):
    words = ["red", "green", "blue", "grey", "pink", "teal", "plum", "gold"]
    rows = [chat(f"say {word} {i}", f"AHOY {word}!") for i in range(3) for word in words]
    return write_jsonl(rows)
