"""A base's tokenizer is the one that its directory holds, never an empty one."""

import pytest
import transformers
from tiny_llm import tokenizer

from loraport.base_model import load_tokenizer
from loraport.errors import LoraportError


# An empty one is what transformers makes of the first four; of the others it raises.
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Qwen2", "T5", "MPNet", "M2M100", "Llama"])
def test_a_base_without_its_tokenizers_files_is_refused(kind, tmp_path):
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    with pytest.raises(LoraportError, match=f"base {tmp_path}: its tokenizer cannot be loaded: "):
        load_tokenizer(str(tmp_path))
    tokenizer().save_pretrained(tmp_path)
    text = "Ships swap their cargo."
    assert load_tokenizer(str(tmp_path))(text)["input_ids"] == tokenizer()(text)["input_ids"]


def test_an_empty_one_says_what_is_missing(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(LoraportError, match=r"got 0 words beside special tokens; copy the token"):
        load_tokenizer(str(tmp_path))


def test_one_of_bytes_needs_no_vocabulary(tmp_path):
    transformers.T5Config().save_pretrained(tmp_path)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    special = 3
    expected = [byte + special for byte in b"Ahoy"]
    assert load_tokenizer(str(tmp_path))("Ahoy")["input_ids"][:-1] == expected
