"""Language models other than Llama: which of them train, and that what is written is theirs."""

import json
import re

import pytest
import torch
import transformers
from command_line import command
from peft import PeftModel
from tiny_llm import save_base

from loraport.base.config import is_causal_lm
from loraport.base.context_length import context_length, context_of
from loraport.base.loading import load_causal_lm, load_model
from loraport.errors import LoraportError
from loraport.peft_layout import read_peft
from loraport.peft_layout.misread import misread_by_peft
from loraport.training import (
    LoopOptions,
    LoraOptions,
    TrainOptions,
    load_into,
    train_language_model,
)
from loraport.training.data.tokens import read_rows
from loraport.training.run.observer import Silent

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


@pytest.mark.parametrize("found", [None, [], ["LLaMAForCausalLM"]])
def test_the_class_of_a_decoder_is_told_where_its_configuration_lacks_it(tmp_path, found):
    """The first Llamas' class is called otherwise; as transformers' `AutoModel` it has no head."""
    base = save_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    remedy = '"architectures": ["LlamaForCausalLM"]'
    (base / "config.json").write_text(json.dumps(config | {"architectures": found}))
    with pytest.raises(LoraportError, match=re.escape(f"; if it is one, write {remedy} into its")):
        load_causal_lm(str(base))
    if found:
        with pytest.raises(LoraportError, match=r"expected a class of transformers .* got LLaMA"):
            load_model(str(base))
    (base / "config.json").write_text(json.dumps(config | json.loads(f"{{{remedy}}}")))
    assert type(load_causal_lm(str(base))) is transformers.LlamaForCausalLM


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


class Watch(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def glm4_moe_base(directory):
    """A dense layer, then one with experts and a shared expert."""
    torch.manual_seed(0)
    config = transformers.Glm4MoeConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        max_position_embeddings=64,
        initializer_range=0.2,
        eos_token_id=1,
        pad_token_id=1,
    )
    return save_base(directory, transformers.Glm4MoeForCausalLM(config))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_what_peft_takes_for_experts_is_told(tmp_path, write_jsonl):
    """PEFT drops dense and shared layers of the names that experts had, and is right without."""
    base, data = glm4_moe_base(tmp_path / "base"), write_jsonl(ROWS)
    loop = LoopOptions(learning_rate=0.02, steps=6, device="cpu", save_every=0)
    tokens = torch.tensor([[5, 9, 70, 200, 31, 8]])
    apart, told = {}, {}
    for name, exclude in (("all", ()), ("without", ("gate_proj", "up_proj", "down_proj"))):
        options = TrainOptions(LoraOptions(rank=3, exclude=exclude), loop, validation_share=0)
        watch = Watch()
        train_language_model(str(base), data, tmp_path / name, options, observer=watch)
        told[name] = [note for note in watch.notes if "PEFT" in note]
        ours, theirs = (load_causal_lm(str(base)) for _ in range(2))
        load_into(ours, read_peft(tmp_path / name))
        theirs = PeftModel.from_pretrained(theirs, tmp_path / name)
        with torch.no_grad():
            apart[name] = float((ours.eval()(tokens).logits - theirs(tokens).logits).abs().max())
    assert apart["without"] < 1e-5
    assert apart["all"] > 0.01  # where it is not, PEFT reads it, and the note has to go
    (note,) = told["all"]
    assert "in models of type glm4_moe it takes gate_proj, up_proj, down_proj for" in note
    assert note.endswith("--exclude gate_proj,up_proj,down_proj")
    assert told["without"] == []


@pytest.mark.parametrize(
    ("model_type", "path", "told"),
    [
        ("deepseek_v3", "model.layers.0.mlp.down_proj", True),
        ("qwen3_next", "model.layers.1.mlp.shared_expert.up_proj", True),
        ("deepseek_v3", "model.layers.0.self_attn.o_proj", False),
        ("qwen2_moe", "model.layers.0.mlp.down_proj", False),
        ("llama", "model.layers.0.mlp.down_proj", False),
        ("minimax", "model.layers.0.mlp.w1", True),
        (None, "w1", False),
    ],
)
def test_which_models_peft_reads_otherwise(model_type, path, told):
    assert bool(misread_by_peft(model_type, [path])) is told
