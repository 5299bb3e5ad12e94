"""Attaching, detaching, and the adapter in between."""

import peft
import peft_cases
import pytest
import torch
import transformers
from torch import nn

from loraport.adapter import Adapter, LoraModule, ModuleKind, Replacement
from loraport.errors import LoraportError
from loraport.peft_layout import read_peft, write_peft
from loraport.training import LoopOptions, LoraOptions, adapter_of, attach, detach, load_into
from loraport.training.lora.lora_layer import LoraLayer

# PEFT asks transformers in a way that is going out of use.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

TOKENS = torch.arange(12)[None]


def randomize_b(layers):
    torch.manual_seed(1)
    for layer in layers.values():
        nn.init.normal_(layer.lora_B, std=0.2)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_detach_restores_the_very_modules_and_flags(llama):
    llama.lm_head.weight.requires_grad_(False)
    modules = dict(llama.named_modules())
    flags = {name: p.requires_grad for name, p in llama.named_parameters()}
    attach(llama, LoraOptions(targets=("q_proj", "embed_tokens")))
    trainable = [name for name, p in llama.named_parameters() if p.requires_grad]
    assert all(name.endswith(("lora_A", "lora_B")) for name in trainable)
    assert len(trainable) == 2 * 3
    detach(llama)
    after = dict(llama.named_modules())
    assert modules.keys() == after.keys()
    assert all(after[name] is module for name, module in modules.items())
    assert {name: p.requires_grad for name, p in llama.named_parameters()} == flags


def test_attaching_twice_or_detaching_nothing_is_an_error(llama):
    with pytest.raises(LoraportError, match="got none"):
        detach(llama)
    with pytest.raises(LoraportError, match="got none"):
        adapter_of(llama)
    attach(llama)
    with pytest.raises(LoraportError, match="got some already"):
        attach(llama)


OPTIONS = {
    "plain": LoraOptions(rank=4, alpha=6),
    "rslora with patterns": LoraOptions(
        rank=4,
        alpha=6,
        use_rslora=True,
        rank_pattern={"q_proj": 6, r"layers\.1\.mlp\.up_proj": 2},
        alpha_pattern={"v_proj": 3},
    ),
    "embedding and head": LoraOptions(rank=3, targets=("embed_tokens", "lm_head", "o_proj")),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_peft_loads_it_and_computes_the_same(llama, tmp_path, name):
    base = logits(llama)
    layers = attach(llama, OPTIONS[name])
    if "patterns" in name:
        ranks = {path.rpartition(".")[2]: layer.rank for path, layer in layers.items()}
        assert ranks["q_proj"] == 6
        assert layers["model.layers.1.mlp.up_proj"].rank == 2
        assert layers["model.layers.0.mlp.up_proj"].rank == 4
    randomize_b(layers)
    ours = logits(llama)
    write_peft(adapter_of(llama, training={"task_type": "CAUSAL_LM"}), tmp_path / "adapter")
    detach(llama)
    assert torch.equal(logits(llama), base)
    theirs = logits(peft.PeftModel.from_pretrained(llama, tmp_path / "adapter"))
    # Both float32, in another order of operations.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - base).abs().max() > 1e-2


PEFT_CONFIGS = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "rslora with patterns": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"k_proj": 5},
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "token rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_loads_what_peft_made(llama, fresh, tmp_path, name):
    base = logits(llama)
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **PEFT_CONFIGS[name])
    wrapped = peft.get_peft_model(llama, config)
    torch.manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape) * 0.2
    theirs = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    load_into(fresh, read_peft(tmp_path / "adapter"))
    torch.testing.assert_close(logits(fresh), theirs, rtol=1e-5, atol=1e-5)
    detach(fresh)
    assert torch.equal(logits(fresh), base)


def test_a_misfit_is_told_whole_and_changes_nothing(llama):
    layers = attach(llama, LoraOptions(rank=2, targets=("q_proj",)))
    adapter = adapter_of(llama)
    detach(llama)
    modules = dict(adapter.modules)
    first, second = modules
    modules["model.layers.9.self_attn.q_proj"] = modules.pop(first)
    modules["lm_head"] = modules[second]
    with pytest.raises(LoraportError) as raised:
        load_into(llama, type(adapter)(modules))
    assert "layers.9.self_attn.q_proj" in str(raised.value)
    assert "lm_head" in str(raised.value)
    assert "lora_B" in str(raised.value)
    attach(llama)  # still without LoRA layers
    assert layers


def gpt_oss():
    """Experts that are stored ``[in, out]``, of as many inputs as outputs."""
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        layer_types=["full_attention"] * 2,
    )
    return transformers.GptOssForCausalLM(config)


PARAMETER_CASES = {
    **{
        name: peft_cases.CASES[name]
        for name in (
            "experts",
            "experts_rslora",
            "parameters_beside_modules",
            "parameter_of_conv1d",
            "parameters_by_name_alone",
        )
    },
    "stored in, out": peft_cases.Case(
        gpt_oss,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "router.weight"],
            "r": 3,
            "alpha_pattern": {"experts.down_proj": 5},
        },
    ),
}


@pytest.mark.parametrize("name", PARAMETER_CASES)
def test_parameters_that_peft_adapts_are_put_in_and_taken_out(name, tmp_path):
    """Fused experts, routers, and weights of one matrix."""
    made = peft_cases.make_case(PARAMETER_CASES[name], tmp_path / "adapter")
    before = dict(made.base.named_parameters())
    base, theirs = peft_cases.logits(made.base), peft_cases.logits(made.peft_model)
    adapter = read_peft(made.path)
    layers = load_into(made.base, adapter)
    assert all(isinstance(made.base.get_submodule(path), LoraLayer) for path in layers)
    torch.testing.assert_close(peft_cases.logits(made.base), theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - base).abs().max() > 0.1
    detach(made.base)
    after = dict(made.base.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[each] is parameter for each, parameter in before.items())
    assert torch.equal(peft_cases.logits(made.base), base)


@pytest.mark.parametrize("name", ["experts", "tokens", "batch_norms", "bias_all"])
def test_what_was_loaded_and_is_not_trained_stays_in_the_adapter(name, tmp_path):
    made = peft_cases.make(name, tmp_path / "adapter")
    loaded = read_peft(made.path)
    layers = load_into(made.base, loaded)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.add_(0.5)
    adapter = adapter_of(made.base)
    detach(made.base)
    assert adapter.modules.keys() == loaded.modules.keys()
    for path, module in loaded.modules.items():
        added = 0.5 if path in layers else 0.0
        assert torch.equal(adapter.modules[path].lora_B, module.lora_B + added)
        assert torch.equal(adapter.modules[path].lora_A, module.lora_A)
    assert adapter.replacements.keys() == loaded.replacements.keys()
    assert loaded.replacements or len(layers) < len(loaded.modules)
    for parameter, replacement in loaded.replacements.items():
        assert torch.equal(adapter.replacements[parameter].tensor, replacement.tensor)
        assert adapter.replacements[parameter].rows == replacement.rows
    assert adapter.counters == loaded.counters


def test_parameters_that_an_adapter_does_not_fit_are_told(tmp_path):
    class Experts(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(shape))

    model = nn.ModuleDict({"mlp": Experts(3, 7, 5), "gate": nn.Linear(5, 3)})
    config = peft.LoraConfig(r=2, target_modules=["gate"], target_parameters=["mlp.experts"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    for shape, got in (
        ((4, 7, 5), "[4, 7, 5]"),
        ((3, 7, 6), "[3, 7, 6]"),
        ((3, 5, 7), "[3, 5, 7]"),  # PEFT looks at the module's is_transposed alone
        ((21, 5), "[21, 5]"),
    ):
        other = nn.ModuleDict({"mlp": Experts(*shape), "gate": nn.Linear(5, 3)})
        with pytest.raises(LoraportError) as raised:
            load_into(other, read_peft(tmp_path))
        assert str(raised.value).splitlines()[1:] == [
            f"  - mlp.experts: expected [3, 7, 5], got {got}"
        ]
    with pytest.raises(LoraportError, match=r"mlp\.experts: expected a parameter of the model"):
        load_into(
            nn.ModuleDict({"mlp": nn.Identity(), "gate": nn.Linear(5, 3)}), read_peft(tmp_path)
        )


def low_rank(out_features, in_features):
    return LoraModule(
        ModuleKind.EXPERTS, torch.randn(2, in_features), torch.randn(out_features, 2), alpha=4.0
    )


@pytest.mark.parametrize("what", ["modules", "replacements"])
def test_what_was_loaded_without_lora_layers_is_an_adapter(what):
    given = {
        "modules": Adapter({"0.weight": low_rank(6, 4)}),
        "replacements": Adapter({}, replacements={"0.weight": Replacement(torch.randn(6, 4))}),
    }[what]
    model = nn.Sequential(nn.Linear(4, 6))
    assert load_into(model, given) == {}
    got = adapter_of(model)
    assert dict(got.modules) == dict(given.modules)
    assert dict(got.replacements) == dict(given.replacements)


def test_a_parameter_that_is_replaced_twice_comes_back():
    """Rows of a tied embedding and of its head, or LoRA on what was replaced."""
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    parameter, values = model["head"].weight, model["head"].weight.detach().clone()
    rows = Replacement(torch.randn(2, 4), rows=(1, 3))
    for adapter in (
        Adapter({}, replacements={"embed.weight": rows, "head.weight": rows}),
        Adapter({"head.weight": low_rank(6, 4)}, replacements={"embed.weight": rows}),
    ):
        load_into(model, adapter)
        assert not torch.equal(model["head"].weight, values)
        detach(model)
        assert model["embed"].weight is parameter
        assert model["head"].weight is parameter
        assert torch.equal(parameter, values)


def test_quantized_parameters_are_refused_and_stay_as_they_are():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, bias=False)).to("cpu")
    x = torch.randn(2, 64)
    before = model(x)
    with pytest.raises(LoraportError, match=r"0\.weight: expected a parameter of floats"):
        load_into(model, Adapter({"0.weight": low_rank(64, 64)}))
    assert torch.equal(model(x), before)


def test_an_adapter_for_another_base_is_refused(llama):
    attach(llama, LoraOptions(rank=2, targets=("q_proj",)))
    adapter = adapter_of(llama)
    detach(llama)
    with torch.no_grad():
        llama.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    with pytest.raises(LoraportError, match="1 of 2 base weights differ"):
        load_into(llama, adapter)


def test_a_module_shared_by_two_paths_is_adapted_at_both():
    model = nn.Module()
    model.a = nn.Linear(4, 4)
    model.b = model.a
    attach(model, LoraOptions(rank=2))
    assert model.a is model.b
    detach(model)
    assert model.a is model.b
    assert isinstance(model.a, nn.Linear)


def test_the_encoder_layers_fast_path_does_not_pass_the_adapter_by():
    """In evaluation mode torch would compute from the children's weights, uncalled."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        base = model(x)
        randomize_b(attach(model, LoraOptions(rank=2)))
        adapted = model(x)
    with torch.enable_grad():
        slow = model(x.requires_grad_())
    torch.testing.assert_close(adapted, slow.detach(), rtol=1e-5, atol=1e-6)
    assert (adapted - base).abs().max() > 1e-2


class Nested(nn.Module):
    """Paths of which one ends with another: a pattern for ``fc`` matches them all."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.x = nn.Sequential()
        self.x.fc = nn.Linear(4, 4)
        self.y = nn.Sequential()
        self.y.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.y.fc(self.x.fc(self.fc(x)))


def test_a_rank_of_a_path_that_others_end_with(tmp_path):
    torch.manual_seed(0)
    model = Nested()
    options = LoraOptions(rank=3, rank_pattern={r"[xy]\.fc": 2, "fc": 4})
    layers = attach(model, options)
    assert [layer.rank for layer in layers.values()] == [4, 2, 2]
    randomize_b(layers)
    x = torch.randn(2, 4)
    expected = model(x)
    write_peft(adapter_of(model), tmp_path / "adapter")
    detach(model)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    torch.testing.assert_close(theirs(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trained_tokens_hold_for_a_tied_head_too(llama, fresh, tmp_path):
    for model in (llama, fresh):
        model.config.tie_word_embeddings = True
        model.tie_weights()
        assert model.lm_head.weight is model.model.embed_tokens.weight
    base = logits(llama)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 7])
    wrapped = peft.get_peft_model(llama, config)
    torch.manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape) * 0.2
    theirs = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    load_into(fresh, read_peft(tmp_path / "adapter"))
    torch.testing.assert_close(logits(fresh), theirs, rtol=1e-5, atol=1e-5)
    detach(fresh)
    assert torch.equal(logits(fresh), base)
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight


@pytest.mark.parametrize(
    "name", ["tied_tokens_of_the_head", "tokens_of_both_stacks", "tied_tokens_and_head"]
)
def test_trained_tokens_hold_where_peft_has_them(name, tmp_path):
    """PEFT follows ties from the input embedding alone; a head's tokens are its own."""
    made = peft_cases.make(name, tmp_path / "adapter")
    theirs = peft_cases.logits(peft_cases.load_with_peft(made.fresh_base(), made.path))
    base = peft_cases.logits(made.base)
    load_into(made.base, read_peft(made.path))
    torch.testing.assert_close(peft_cases.logits(made.base), theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - base).abs().max() > 0.1
    again = adapter_of(made.base)
    detach(made.base)
    assert torch.equal(peft_cases.logits(made.base), base)
    load_into(made.base, again)  # of this base, though tokens of its head were replaced
    torch.testing.assert_close(peft_cases.logits(made.base), theirs, rtol=1e-5, atol=1e-5)


def test_statistics_of_saved_normalizations_are_put_in_and_taken_out(tmp_path):
    made = peft_cases.make("batch_norms", tmp_path / "adapter")
    before = {name: tensor.clone() for name, tensor in made.base.state_dict().items()}
    base, theirs = peft_cases.logits(made.base), peft_cases.logits(made.peft_model)
    load_into(made.base, read_peft(made.path))
    torch.testing.assert_close(peft_cases.logits(made.base), theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - base).abs().max() > 0.1
    detach(made.base)
    after = made.base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("options", [LoraOptions, LoopOptions])
def test_seeds_are_those_that_torch_takes(options):
    """Control: torch refuses the next one on either side."""
    for seed, beyond in ((-(2**63), -(2**63) - 1), (2**64 - 1, 2**64)):
        torch.Generator().manual_seed(options(seed=seed).seed)
        with pytest.raises(LoraportError, match=rf"seed: expected a whole .*, got {beyond}"):
            options(seed=beyond)
        with pytest.raises((ValueError, RuntimeError)):
            torch.Generator().manual_seed(beyond)
