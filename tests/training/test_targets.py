"""Which modules are selected, against PEFT's own selection."""

import peft
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from loraport.errors import LoraportError
from loraport.training import LoopOptions, LoraOptions, TrainOptions, attach, detach
from loraport.training.lora.targets import select_targets

# PEFT asks transformers in a way that is going out of use.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def peft_targets(model, **config):
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **config))
    inner = wrapped.base_model.model
    found = {n for n, m in inner.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    wrapped.unload()
    return found


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"targets": "all-linear"}, {"target_modules": "all-linear"}),
        ({"targets": ("q_proj", "v_proj")}, {"target_modules": ["q_proj", "v_proj"]}),
        ({"targets": ("mlp.up_proj",)}, {"target_modules": ["mlp.up_proj"]}),
        ({"targets": ("embed_tokens",)}, {"target_modules": ["embed_tokens"]}),
        ({"targets": ("lm_head", "o_proj")}, {"target_modules": ["lm_head", "o_proj"]}),
        ({"targets": r".*\.1\..*_proj"}, {"target_modules": r".*\.1\..*_proj"}),
        (
            {"targets": ("q_proj", "k_proj"), "layers": "1"},
            {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
        ),
        (
            {"targets": ("q_proj", "k_proj"), "exclude": r".*0.*k_proj"},
            {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*0.*k_proj"},
        ),
        (
            {"targets": "all-linear", "exclude": ("mlp.up_proj", "q_proj")},
            {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "q_proj"]},
        ),
    ],
)
def test_selects_what_peft_selects(llama, ours, theirs):
    selected = set(select_targets(llama, LoraOptions(**ours)))
    assert selected == peft_targets(llama, **theirs)
    assert selected


def test_all_linear_takes_conv1d_and_leaves_the_head():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16))
    selected = set(select_targets(model, LoraOptions()))
    ends = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert selected == {f"transformer.h.0.{end}" for end in ends}


def test_routers_that_are_linear_layers_by_name_alone_are_left_alone():
    """Llama 4's and Phi-MoE's give what experts take; with LoRA beside them nothing ran."""
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 1}
    more = {"head_dim": 8, "intermediate_size_mlp": 8, "interleave_moe_layer_step": 1}
    experts = {"num_local_experts": 2}
    models = (
        Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, **more, **experts)),
        PhimoeForCausalLM(PhimoeConfig(**sizes, **heads, **experts)),
    )
    for model in models:
        routers = {p for p, m in model.named_modules() if "Router" in type(m).__name__}
        assert len(routers) == 1
        layers = attach(model.eval(), LoraOptions(rank=2))
        assert not routers & set(layers)
        assert {path.rpartition(".")[2] for path in layers} >= {"q_proj", "k_proj", "v_proj"}
        tokens = torch.arange(6)[None]
        assert model(input_ids=tokens).logits.shape == (1, 6, 32)
        detach(model)
        with pytest.raises(LoraportError, match=r"'router': expected a Linear, .*Router"):
            select_targets(model, LoraOptions(targets=("router",)))


def test_layer_ranges(llama):
    selected = select_targets(llama, LoraOptions(targets=("q_proj",), layers="0-1"))
    assert len(selected) == 2


def refusal(model, **options):
    with pytest.raises(LoraportError) as raised:
        select_targets(model, LoraOptions(**options))
    return str(raised.value)


def test_unknown_names_are_all_told_with_close_ones(llama):
    text = refusal(llama, targets=("q_prj", "v_proj", "zzz"), rank_pattern={"kproj": 4})
    assert "targets 'q_prj'" in text
    assert "did you mean q_proj" in text
    assert "targets 'zzz'" in text
    assert "available: embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj" in text
    assert "rank_pattern 'kproj'" in text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"targets": "nothing.*here"}, "no match"),
        ({"targets": ("q_proj",), "exclude": ("q_proj",)}, "expected at least one module"),
        ({"targets": ("q_proj",), "exclude": ("kproj",)}, "exclude 'kproj'"),
        ({"layers": "0-7"}, "expected layers 0 to 1, got also 2 to 7"),
        ({"layers": "3-1"}, "expected ranges like 0-3,8"),
        ({"targets": "("}, "expected a regular expression"),
        ({"targets": ("self_attn",)}, "got a LlamaAttention; name what it holds: q_proj, k_proj"),
        ({"targets": ("q_proj",), "alpha_pattern": {"v_proj": 2}}, "alpha_pattern 'v_proj'"),
    ],
)
def test_what_selects_nothing_is_an_error(llama, options, reason):
    assert reason in refusal(llama, **options)


def test_attention_that_never_calls_its_projection_is_refused():
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    assert set(select_targets(model, LoraOptions())) == {"linear1", "linear2"}
    assert "without calling it" in refusal(model, targets=("out_proj",))


def test_grouped_convolutions_and_renormalised_embeddings_are_refused():
    model = nn.ModuleDict(
        {"conv": nn.Conv1d(4, 4, 3, groups=2), "emb": nn.Embedding(5, 3, max_norm=1.0)}
    )
    assert "2 groups" in refusal(model, targets=("conv",))
    assert "max_norm" in refusal(model, targets=("emb",))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rank": 0}, "rank: expected at least 1, got 0"),
        ({"rank": 2.5}, r"rank: expected a whole number, at least 1, got 2\.5$"),
        ({"rank": "8"}, "rank: expected a whole number, at least 1, got '8'$"),
        ({"rank_pattern": {"q": 1.5}}, "rank_pattern q: expected a whole number"),
        ({"seed": 0.5}, "seed: expected a whole number from"),
        ({"alpha": float("nan")}, "alpha: expected a finite number"),
        ({"alpha": "4"}, "alpha: expected a finite number other than 0, got '4'$"),
        ({"alpha_pattern": {"q": "2"}}, "alpha_pattern q: expected a finite number.*, got '2'$"),
        ({"dropout": "0.1"}, r"dropout: expected a share from 0 to below 1, got '0\.1'$"),
        ({"rank_pattern": [("q", 2)]}, r"rank_pattern: expected a mapping, such as .*, got \["),
        ({"use_rslora": "no"}, "use_rslora: expected True or False, got 'no'$"),
        ({"use_dora": "false"}, "use_dora: expected True or False, got 'false'$"),
        ({"targets": (0,)}, r"targets: expected names, or one regular expression, got \(0,\)$"),
        ({"exclude": None}, "exclude: expected names, or one regular expression, got None$"),
        ({"dropout": 1.0}, "dropout: expected a share"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern q"),
        ({"init": "zeros"}, "init: expected kaiming, gaussian, pissa or olora"),
    ],
)
def test_options_out_of_range(options, reason):
    with pytest.raises(LoraportError, match=reason):
        LoraOptions(**options)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (LoopOptions, "epochs steps accumulate keep save_every validate_every early_stopping"),
        (TrainOptions, "batch_size max_length checkpointed_layers"),
    ],
)
def test_counts_are_whole_numbers(kind, names):
    more = {"gradient_checkpointing": True} if kind is TrainOptions else {}
    for name in names.split():
        kind(**more, **{name: 3})
        for wrong in (3.5, 3.0, "3"):
            told = f"  - {name}: expected a whole number, at least [012], got {wrong!r}$"
            with pytest.raises(LoraportError, match=told):
                kind(**more, **{name: wrong})


@pytest.mark.parametrize(
    ("kind", "names", "wrongs"),
    [
        # YAML reads 1e-3 as a text.
        (LoopOptions, "learning_rate lora_plus_ratio weight_decay clip warmup", ("1e-3", None)),
        (TrainOptions, "validation_share", ("0.1", None)),
        (LoopOptions, "shard_base", ("false", None)),
        (TrainOptions, "gradient_checkpointing compile liger_kernel", ("no", None)),
        (TrainOptions, "cuda_graphs", ("no",)),
    ],
)
def test_texts_are_no_numbers_and_no_switches(kind, names, wrongs):
    kind(**{name: getattr(kind(), name) for name in names.split()})
    for name in names.split():
        for wrong in wrongs:
            with pytest.raises(LoraportError, match=f"  - {name}: expected .*, got {wrong!r}$"):
                kind(**{name: wrong})
