"""An encoder directory, exported through torch, computes with an adapter what PEFT computes."""

import numpy as np
import pytest
import torch
from peft_cases import Case, bert, load_with_peft, make_case
from tiny_llm import save_base, tokenizer
from torch import nn

from converters.formats.registry import read_adapter
from converters.onnx import ExportOptions, add_adapters, export_base
from converters.onnx.modules.graph_weights import load_graph_weights
from loraport.base.loading import load_model
from loraport.bundle.manifest import read_manifest
from loraport.errors import LoraportError
from loraport.parity import verify_bundle
from loraport.runtime import Runtime

VISION = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def encoder_base(tmp_path_factory):
    out = tmp_path_factory.mktemp("bert") / "base"
    torch.manual_seed(0)
    model = bert().eval()
    model.resize_token_embeddings(320, mean_resizing=False)
    model.save_pretrained(out)
    tokenizer().save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def made(encoder_base, tmp_path_factory):
    options = {"target_modules": ["query", "value", "dense"], "r": 4, "use_rslora": True}
    out = tmp_path_factory.mktemp("bert") / "a"
    return make_case(Case(bert, options), out, base=load_model(str(encoder_base)))


@pytest.fixture(scope="module")
def encoder(encoder_base, made, tmp_path_factory):
    out = tmp_path_factory.mktemp("bert") / "bundle"
    export_base(str(encoder_base), out)
    add_adapters(out, {"a": read_adapter(made.path)})
    return out


def test_every_linear_module_has_a_slot(encoder, made):
    linear = [n for n, m in made.base.named_modules() if isinstance(m, nn.Linear)]
    assert sorted(read_manifest(encoder).slots.modules()) == sorted(linear)
    assert read_manifest(encoder).unslotted == {}


@pytest.mark.parametrize("texts", [["Ships."], ["One longer text, 東京.", "Two", "III"]])
def test_batch_and_length_are_free_and_the_numbers_are_pefts(encoder, made, texts):
    encoded = tokenizer()(texts, padding=True, return_tensors="np")
    runtime = Runtime(encoder)
    accepted = [entry.name for entry in runtime.session.get_inputs()]
    arrays = {name: np.asarray(encoded[name], np.int64) for name in accepted}
    peft_model = load_with_peft(made.fresh_base(), made.path)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        base, adapted = (model(**tensors).logits for model in (made.base, peft_model))
    np.testing.assert_allclose(runtime.run(arrays)["logits"], base, atol=1e-4)
    np.testing.assert_allclose(runtime.run(arrays, "a")["logits"], adapted, atol=1e-4)
    assert (adapted - base).abs().max() > 0.05


def test_the_protocol_holds(encoder, made):
    report = verify_bundle(encoder, made.fresh_base(), {"a": read_adapter(made.path)})
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.samples >= 20


def gpt2_with_head():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 320, "n_embd": 32, "n_layer": 1, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))


def t5_encoder():
    from transformers import T5Config, T5EncoderModel

    sizes = {"vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1}
    return T5EncoderModel(T5Config(**sizes, num_heads=4))


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    text = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 4, "initializer_range": 0.2}
    seen = CLIPVisionConfig(**VISION, hidden_size=24, intermediate_size=32)
    return Llava(LlavaConfig(text_config=LlamaConfig(**text), vision_config=seen))


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (gpt2_with_head, ["c_attn", "c_fc"]),
        (t5_encoder, ["q", "v", "wo"]),
        (llava, r".*language_model.*(q_proj|down_proj)"),
    ],
)
def test_what_torch_does_not_export_as_it_is(make, targets, tmp_path):
    """GPT-2 returns its cache, and T5's attention in one operator cannot be taken apart.

    A model that also sees returns the cache of its part for text, which has a setting of its own.
    """
    torch.manual_seed(0)
    model = make().eval()
    save_base(tmp_path / "base", model)
    made = make_case(Case(make, {"target_modules": targets, "r": 4}), tmp_path / "a", base=model)
    out = tmp_path / "bundle"
    export_base(str(tmp_path / "base"), out)
    add_adapters(out, {"a": read_adapter(made.path)})
    encoded = tokenizer()(["One longer text, 東京.", "Two"], padding=True, return_tensors="np")
    runtime = Runtime(out)
    accepted = [entry.name for entry in runtime.session.get_inputs()]
    arrays = {name: np.asarray(encoded[name], np.int64) for name in accepted if name in encoded}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with torch.no_grad():
        base, adapted = (m(**tensors)[0].numpy() for m in (made.base, made.peft_model))
    np.testing.assert_allclose(next(iter(runtime.run(arrays).values())), base, atol=1e-4)
    got = next(iter(runtime.run(arrays, "a").values()))
    np.testing.assert_allclose(got, adapted, atol=1e-4)
    assert np.abs(adapted - base).max() > 0.05


@pytest.fixture
def gpt2_classifier(tmp_path):
    """A base whose tokenizer cannot pad, as GPT-2's; its ``Conv1D`` stores weights turned."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "n_embd": 32, "n_layer": 1, "n_head": 4, "num_labels": 3}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = GPT2Config(**sizes, **ends, initializer_range=0.2)
    save_base(tmp_path / "base", GPT2ForSequenceClassification(config).eval())
    unpadded = tokenizer()
    unpadded.pad_token = None
    unpadded.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_tokenizer_that_cannot_pad(gpt2_classifier, tmp_path):
    export_base(str(gpt2_classifier), tmp_path / "out")
    encoded = [tokenizer()(text) for text in ("One longer text, 東京.", "Two")]
    model = load_model(str(gpt2_classifier))
    for entry in encoded:  # the length is free, though both examples have the same
        arrays = {name: np.array([entry[name]]) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            expected = model(**{name: torch.from_numpy(a) for name, a in arrays.items()}).logits
        got = Runtime(tmp_path / "out").run(arrays)["logits"]
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)


def test_a_base_without_its_tokenizer(gpt2_classifier, tmp_path):
    for file in gpt2_classifier.glob("token*"):
        file.unlink()
    with pytest.raises(LoraportError, match=r"expected its vocabulary in .*got 0 words.*copy the"):
        export_base(str(gpt2_classifier), tmp_path / "out")


def test_verify_reads_the_weights_that_a_base_stores_turned(gpt2_classifier, tmp_path):
    export_base(str(gpt2_classifier), tmp_path / "out", ExportOptions(precision="int8"))
    model, exact = load_model(str(gpt2_classifier)), load_model(str(gpt2_classifier))
    replaced = load_graph_weights(tmp_path / "out" / "model.onnx", model)
    names = [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")]
    assert set(names) < set(replaced)
    for name in names:  # c_proj is square: it would fit the wrong way round, too
        own, rounded = (m.get_submodule(name).weight.detach() for m in (exact, model))
        assert 0 < (rounded - own).norm() < 0.01 * own.norm()
        if own.shape[0] == own.shape[1]:
            assert (rounded - own.T).norm() > own.norm()
    assert verify_bundle(tmp_path / "out", model, {}).passed


def vit():
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**VISION, hidden_size=24, intermediate_size=32))


def clip():
    from transformers import CLIPConfig, CLIPModel

    text = {"vocab_size": 320, "num_hidden_layers": 1, "eos_token_id": 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION))


def t5_whole():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1}
    return T5ForConditionalGeneration(T5Config(**sizes, num_heads=4, decoder_start_token_id=0))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (vit, "ViTModel, which takes pixel_values"),
        (clip, "CLIPModel, which fails with them: "),
        (t5_whole, "T5ForConditionalGeneration, which fails with them: "),
    ],
)
def test_what_takes_more_than_tokens_is_refused_with_where_to_export_it(make, reason, tmp_path):
    save_base(tmp_path / "base", make())
    with pytest.raises(
        LoraportError, match=f"expected a model that takes tokens alone, got {reason}"
    ) as refused:
        export_base(str(tmp_path / "base"), tmp_path / "bundle")
    assert "converters.onnx.export_torch_module, or as an .onnx file" in str(refused.value)
    assert not (tmp_path / "bundle").exists()
