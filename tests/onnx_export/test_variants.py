"""Every variant of PEFT's in slots: outputs as PEFT's, verified; blended and scaled exactly."""

import shutil

import numpy as np
import pytest
import torch
from peft_cases import CASES, Case, ConvNet, bert, llama, make_case
from torch import nn

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters, export_torch_module
from converters.onnx.slots.inserting import SlotOptions
from loraport.errors import LoraportError
from loraport.parity import Sample, verify_bundle
from loraport.parity.changes import changes_of
from loraport.parity.reference import adapted, torch_outputs
from loraport.runtime import Runtime

CLOSE = {"rtol": 1e-4, "atol": 3e-5}  # float32 sums through two layers
ALL = ("lora", "gain", "bias", "embedding", "conv")
IDS = np.random.default_rng(0).integers(1, 17, (2, 8))


class Logits(nn.Module):
    """A decoder without its cache."""

    def __init__(self, model):
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head

    def forward(self, input_ids):
        found = self.model(input_ids=input_ids, use_cache=False)
        return self.lm_head(found.last_hidden_state)


class VolumeNet(nn.Module):
    """3-d convolutions over what an embedding gives, as of a short video."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(17, 8)
        self.conv3d = nn.Conv3d(1, 6, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 2))
        self.pointwise = nn.Conv3d(6, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, input_ids):
        volume = self.embed(input_ids).reshape(-1, 1, 4, 4, 4)
        hidden = self.pointwise(torch.tanh(self.conv3d(volume)))
        return self.head(hidden.mean((2, 3, 4)))


def with_biases(model):
    torch.manual_seed(0)
    model = model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


# Architecture → what makes it; adapters of one architecture share its bundle.
MODELS = {
    "conv": lambda: with_biases(ConvNet()),
    "volume": lambda: with_biases(VolumeNet()),
    "bert": lambda: with_biases(bert()),
    "llama": lambda: Logits(with_biases(llama(attention_bias=True))).eval(),
}
ATTENTION = ["q_proj", "o_proj", "down_proj"]
ADAPTERS = {
    "conv": {"conv": {"target_modules": ["conv1d", "conv2d", "pointwise", "head"], "r": 4}},
    "conv_rslora": {"conv": {"target_modules": ["conv2d", "embed"], "use_rslora": True, "r": 3}},
    "conv_dora": {"conv": CASES["conv_dora"].options},
    "conv_bias": {"conv": CASES["conv_bias"].options},
    "conv_grouped": {"conv": CASES["conv_grouped"].options},
    "volume": {"volume": {"target_modules": ["conv3d", "pointwise", "head"], "r": 3}},
    "volume_dora": {"volume": {"target_modules": ["conv3d", "pointwise"], "use_dora": True}},
    "volume_bias": {"volume": {"target_modules": ["conv3d"], "lora_bias": True, "r": 4}},
    "bert_lora": {"bert": {"target_modules": ["query", "dense"], "r": 4}},
    "bert_dora": {"bert": CASES["bert_dora"].options},
    "bert_lora_bias": {"bert": {"target_modules": ["query", "dense"], "r": 3, "lora_bias": True}},
    "llama_lora": {"llama": {"target_modules": ATTENTION, "r": 4}},
    "llama_dora": {"llama": {"target_modules": ATTENTION, "use_dora": True, "use_rslora": True}},
    "llama_bias": {"llama": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True}},
    "llama_embedding": {"llama": {"target_modules": ["embed_tokens", "v_proj"], "r": 4}},
    "llama_embedding_dora": {"llama": {"target_modules": ["embed_tokens"], "use_dora": True}},
    "llama_tokens": {"llama": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}},
}


@pytest.fixture(scope="module")
def bases():
    return {name: make() for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def bundles(bases, tmp_path_factory):
    """Two per architecture: with and without a strength input; made when first asked for."""
    made = {}

    def of(model, strength=False):
        if (model, strength) not in made:
            out = tmp_path_factory.mktemp(model) / "bundle"
            slots = SlotOptions(ALL, strength=strength)
            inputs = {"input_ids": torch.from_numpy(IDS)}
            export_torch_module(bases[model], inputs, out, slots=slots)
            made[model, strength] = out
        return made[model, strength]

    return of


@pytest.fixture(scope="module")
def made_of(bases, tmp_path_factory):
    found = {}

    def of(name):
        if name not in found:
            ((model, options),) = ADAPTERS[name].items()
            out = tmp_path_factory.mktemp(name) / "adapter"
            seed = list(ADAPTERS).index(name)
            found[name] = make_case(Case(lambda: None, options), out, seed, base=bases[model])
        return found[name]

    return of


def model_of(name):
    return next(iter(ADAPTERS[name]))


def torch_logits(model):
    return torch_outputs(model.eval(), {"input_ids": IDS})[0]


def run(bundle, selection=None, **controls):
    feeds = {"input_ids": IDS, **controls}
    return next(iter(Runtime(bundle, threads=1).run(feeds, selection).values()))


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_equals_peft_and_verifies(name, bundles, bases, made_of, tmp_path):
    own = shutil.copytree(bundles(model_of(name)), tmp_path / "own")
    made = made_of(name)
    adapter = read_adapter(made.path)
    add_adapters(own, {"a": adapter})
    got, expected = run(own, "a"), torch_logits(made.peft_model)
    np.testing.assert_allclose(got, expected, **CLOSE)
    assert np.abs(expected - torch_logits(bases[model_of(name)])).max() > 100 * CLOSE["atol"]
    sample = Sample({"input_ids": IDS}, {"input_ids": IDS})
    report = verify_bundle(own, bases[model_of(name)], {"a": adapter}, samples=[sample])
    assert report.passed, [check for check in report.checks if not check.passed]


BLENDS = [
    {"llama_dora": 0.7, "llama_lora": -0.4},
    {"llama_dora": 1.0, "llama_lora": 1.0, "llama_bias": 0.5},
    {"llama_embedding_dora": 0.3, "llama_embedding": 0.6},
    {"llama_embedding": -0.6, "llama_tokens": 1.5},
    {"llama_embedding_dora": 0.3, "llama_tokens": 1.5},
    {"llama_dora": 2.0},
    {"bert_dora": 0.5, "bert_lora": 0.5, "bert_lora_bias": -1.0},
    {"volume_dora": 0.4, "volume": -0.9, "volume_bias": 1.1},
    {"conv_dora": 0.4, "conv": 0.9, "conv_bias": 1.1, "conv_grouped": -0.8},
]


@pytest.mark.parametrize("strengths", BLENDS, ids=lambda found: "+".join(found))
def test_a_blend_is_the_exact_sum_in_float64(strengths, bundles, made_of, tmp_path):
    own = shutil.copytree(bundles(model_of(next(iter(strengths)))), tmp_path / "own")
    adapters = {name: read_adapter(made_of(name).path) for name in strengths}
    add_adapters(own, adapters)
    got = run(own, strengths)
    model = made_of(next(iter(strengths))).fresh_base().double()
    parts = [(adapters[name], strength) for name, strength in strengths.items()]
    with adapted(model, changes_of(parts, model)):
        expected = torch_logits(model)
    np.testing.assert_allclose(got, expected, **CLOSE)
    # The control: strengths that are a tenth off are not the same.
    other = [(adapter, strength * 1.1) for adapter, strength in parts]
    with adapted(model, changes_of(other, model)):
        assert np.abs(torch_logits(model) - got).max() > 10 * CLOSE["atol"]


@pytest.mark.parametrize(
    "name", ["llama_dora", "llama_embedding_dora", "bert_lora_bias", "conv_dora", "volume_dora"]
)
@pytest.mark.parametrize("strength", [0.0, 0.35, -1.2])
def test_a_strength_input_interpolates(name, strength, bundles, made_of, tmp_path):
    own = shutil.copytree(bundles(model_of(name), strength=True), tmp_path / "own")
    adapter = read_adapter(made_of(name).path)
    add_adapters(own, {"a": adapter})
    got = run(own, "a", lora_strength=np.array([strength], np.float32))
    if strength == 0:
        assert np.array_equal(got, run(own))
        return
    model = made_of(name).fresh_base().double()
    with adapted(model, changes_of([(adapter, strength)], model)):
        expected = torch_logits(model)
    np.testing.assert_allclose(got, expected, **CLOSE)
    # The same as the strength folded in when the adapter is chosen.
    np.testing.assert_allclose(got, run(own, {"a": strength}), **CLOSE)
    assert np.abs(got - run(own, "a")).max() > 10 * CLOSE["atol"]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("llama_dora", "export again with gain among --slots"),
        ("llama_bias", "export again with bias among --slots"),
        ("llama_embedding", "export again with embedding among --slots"),
        ("llama_tokens", "export again with embedding among --slots"),
    ],
)
def test_a_variant_that_was_not_exported_says_what_to_export(name, remedy, bases, made_of):
    from converters.onnx.packing.pack import pack
    from loraport.bundle.slots import Slot, SlotMember, SlotTable

    slots = tuple(
        Slot(path, m.in_features, m.out_features, "FLOAT", (SlotMember(path, 0, m.out_features),))
        for path, m in bases["llama"].named_modules()
        if isinstance(m, nn.Linear)
    )
    with pytest.raises(LoraportError, match=remedy):
        pack(read_adapter(made_of(name).path), SlotTable(slots), {})
