"""Language models other than Llama: which of them train, and that what is written is theirs."""

import json

import pytest
import torch
import transformers
from command_line import command
from peft import PeftModel
from tiny_llm import save_base

from loraport.base_model import context_length, context_of, is_causal_lm, load_causal_lm
from loraport.errors import LoraportError
from loraport.training import LoopOptions, LoraOptions, TrainOptions, train_language_model
from loraport.training.data.tokens import read_rows

# PEFT asks transformers for a name that is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ROWS = [{"prompt": f"say {word} ", "completion": f"AHOY {word}!"} for word in ("tea", "cargo")]


def gpt2_base(directory):
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2}
    sizes = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    config = transformers.GPT2Config(**sizes, **still, bos_token_id=0, eos_token_id=1)
    return save_base(directory, transformers.GPT2LMHeadModel(config))


@pytest.mark.parametrize(
    ("architecture", "more", "decoder"),
    [
        ("GPT2LMHeadModel", {}, True),
        ("OpenAIGPTLMHeadModel", {}, True),
        ("CTRLLMHeadModel", {}, True),
        ("BertLMHeadModel", {"is_decoder": True}, True),
        ("BertLMHeadModel", {"is_decoder": False}, False),
        ("BertForMaskedLM", {}, False),
        ("T5ForConditionalGeneration", {}, False),
        ("Gemma3ForConditionalGeneration", {}, False),
        ("XLNetLMHeadModel", {}, False),
        ("GPT2Model", {}, False),
    ],
)
def test_a_decoder_is_known_by_its_class(tmp_path, architecture, more, decoder):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], **more}))
    assert is_causal_lm(tmp_path) is decoder
    if not decoder:
        with pytest.raises(LoraportError, match=f"expected a decoder .*{architecture}"):
            load_causal_lm(str(tmp_path))


def test_gpt2_trains_and_merges_as_peft_has_it(tmp_path, write_jsonl):
    """Logits of the base with the adapter, of the merged model, and of PEFT; c_proj is square."""
    base, out = gpt2_base(tmp_path / "base"), tmp_path / "adapter"
    data = write_jsonl(ROWS)
    loop = LoopOptions(learning_rate=0.02, steps=8, device="cpu", save_every=0)
    options = TrainOptions(LoraOptions(rank=3), loop, batch_size=2)
    summary = train_language_model(str(base), data, out, options, validation=data)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(load_causal_lm(str(base)), out).eval()
    assert command("merge", base, out, "-o", tmp_path / "merged")[0] == 0
    merged = load_causal_lm(str(tmp_path / "merged"))
    total = count = 0.0
    with torch.no_grad():
        for row in read_rows(data, tokenizer, 64).rows:
            tokens, labels = torch.tensor([row.tokens]), torch.tensor([row.labels])
            output = model(input_ids=tokens, labels=labels)
            counted = int((labels[:, 1:] != -100).sum())
            total, count = total + float(output.loss) * counted, count + counted
            assert torch.allclose(merged(input_ids=tokens).logits, output.logits, atol=2e-5)
            with model.disable_adapter():
                plain = model(input_ids=tokens).logits
            assert not torch.allclose(plain, output.logits, atol=0.1)
    assert summary.validation_loss == pytest.approx(total / count, rel=1e-5)
    assert summary.validation_loss < 0.9 * summary.base_validation_loss


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"model_type": "gptj", "n_positions": 64}, 64),
        ({"model_type": "gpt_bigcode", "n_positions": 48}, 48),
        ({"model_type": "llama", "max_position_embeddings": 32}, 32),
        ({"model_type": "roberta", "max_position_embeddings": 34, "pad_token_id": 1}, 32),
        ({"model_type": "xglm", "max_position_embeddings": 32, "pad_token_id": 1}, 32),
        ({"model_type": "biogpt", "max_position_embeddings": 32, "pad_token_id": 1}, 32),
        ({"model_type": "mamba"}, None),
        ({"model_type": "xlnet"}, None),  # which says -1
        ({"model_type": "of-the-future", "max_position_embeddings": 16}, 16),
        ({"model_type": "of-the-future", "max_position_embeddings": "many"}, None),
    ],
)
def test_the_context_has_many_names(tmp_path, config, length):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_length(tmp_path) == length


@pytest.mark.parametrize("kind", ["Roberta", "RobertaPreLayerNorm", "XLMRoberta", "Xmod"])
def test_a_row_is_as_long_as_the_table_of_positions(kind):
    """Of RoBERTa's, positions begin after the number of the padding token."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 40}
    more = {"num_attention_heads": 2, "max_position_embeddings": 20, "pad_token_id": 3}
    languages = {"languages": ["en_XX"], "default_language": "en_XX"} if kind == "Xmod" else {}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, **more, **languages, is_decoder=True, bos_token_id=0, eos_token_id=2
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    length = context_of(config)
    assert length == 16
    model(input_ids=torch.full((1, length), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, length + 1), 5))


def test_rows_are_cut_to_a_context_of_another_name(tmp_path, write_jsonl):
    base = gpt2_base(tmp_path / "base")
    data = write_jsonl([{"text": "ships and tea " * 40}, {"text": "tea"}])
    loop = LoopOptions(steps=1, device="cpu", save_every=0)
    options = TrainOptions(LoraOptions(rank=2), loop, batch_size=2, validation_share=0)
    summary = train_language_model(str(base), data, tmp_path / "out", options)
    assert (summary.rows, summary.truncated_rows) == (2, 1)
