"""A base's tokenizer is the one that its directory holds, never an empty one."""

import json

import pytest
import transformers
from tiny_llm import tokenizer

from converters.formats.base_facts import _with_defaults
from converters.merge.layout import _model_without_weights
from loraport.base.context_length import context_length
from loraport.base.loading import load_model, load_tokenizer, model_without_weights
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


def test_code_that_a_base_brings_is_never_run_nor_asked_for(tmp_path, monkeypatch):
    """transformers asks on the terminal, and runs it where the answer is y."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "n")
    tokenizer().save_pretrained(tmp_path)
    own = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": own}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('this ran')\n")
    transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert asked.pop().startswith(f"The repository {tmp_path} contains custom code")  # control
    asked.clear()

    text = "Ships swap their cargo."
    assert load_tokenizer(str(tmp_path))(text)["input_ids"] == tokenizer()(text)["input_ids"]
    assert context_length(tmp_path) is None
    assert model_without_weights(tmp_path) is None
    assert _model_without_weights(tmp_path, None) is None
    assert _with_defaults(tmp_path) == config
    said = "got one that is Python code in the base's own directory"
    with pytest.raises(LoraportError, match=f"base {tmp_path}: cannot be loaded: .*{said}"):
        load_model(str(tmp_path))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    settings |= {"auto_map": {"AutoTokenizer": ["own.Slow", None]}, "tokenizer_class": "Slow"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(LoraportError, match=f"its tokenizer cannot be loaded: .*{said}"):
        load_tokenizer(str(tmp_path))
    assert asked == []
