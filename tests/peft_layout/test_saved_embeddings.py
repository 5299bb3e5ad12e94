"""Embeddings that PEFT saves whole beside the rows that were trained of them."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_cases import llama, load_with_peft, logits
from safetensors.torch import load_file, save_file

from loraport.errors import LoraportError
from loraport.peft_layout import read_peft, write_peft

_TENSORS = "adapter_model.safetensors"
_PLACE = "base_model.model.model.embed_tokens.token_adapter."


def resized_and_trained(path, *, tied):
    """Save what PEFT's guide has for new tokens: a resized base, of which two rows are trained."""
    torch.manual_seed(0)
    base = llama(tie=tied)
    base.resize_token_embeddings(base.config.vocab_size + 2, mean_resizing=False)
    rows = [base.config.vocab_size - 2, base.config.vocab_size - 1]
    options = LoraConfig(target_modules=["q_proj"], r=3, trainable_token_indices=rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT calls of transformers' is deprecated
        model = get_peft_model(copy.deepcopy(base), options).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3 if "lora" in name else 1.0)
    model.save_pretrained(path, save_embedding_layers=True)
    return base, model, rows


@pytest.mark.parametrize("tied", [False, True])
def test_the_whole_has_the_trained_rows(tied, tmp_path):
    base, model, rows = resized_and_trained(tmp_path / "theirs", tied=tied)
    stored = load_file(tmp_path / "theirs" / _TENSORS)
    adapter = read_peft(tmp_path / "theirs")
    found = adapter.replacements["model.embed_tokens.weight"]
    expected = stored[f"{_PLACE}base_layer.weight"].clone()
    expected[rows] = stored[f"{_PLACE}trainable_tokens_delta"]
    assert found.rows is None
    assert torch.equal(found.tensor, expected)
    assert not torch.equal(found.tensor[rows], base.get_input_embeddings().weight[rows])
    write_peft(adapter, tmp_path / "ours")
    again = logits(load_with_peft(copy.deepcopy(base), tmp_path / "ours"))
    assert torch.allclose(again, logits(model), rtol=0, atol=1e-5)
    assert (again - logits(base)).abs().max() > 1e-2


def test_rows_that_the_whole_does_not_have_are_refused(tmp_path):
    resized_and_trained(tmp_path / "adapter", tied=False)
    stored = load_file(tmp_path / "adapter" / _TENSORS)
    key = f"{_PLACE}base_layer.weight"
    save_file({**stored, key: stored[key][:5].clone()}, tmp_path / "adapter" / _TENSORS)
    with pytest.raises(LoraportError, match=r"one tensor for model\.embed_tokens\.weight, got a"):
        read_peft(tmp_path / "adapter")
