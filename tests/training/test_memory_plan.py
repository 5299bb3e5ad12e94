"""Predicted memory against element counts done by hand, and against bitsandbytes' tensors."""

import pytest
import torch
from torch import nn

from loraport.training.memory.memory_plan import kept_memory, moments_bytes, quantized_bytes
from loraport.training.options import LoraOptions

LAYERS, WIDTH, INNER, VOCAB, RANK = 32, 4096, 11008, 32000, 16
# Llama 7B: q, k, v, o of [4096, 4096]; gate and up of [11008, 4096], down of [4096, 11008].
LINEAR = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
OTHER = 2 * VOCAB * WIDTH + (2 * LAYERS + 1) * WIDTH  # embedding, head, norms


@pytest.fixture(scope="module")
def llama_7b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def test_7b_in_nf4_with_rank_16_on_all_linear_layers(llama_7b: nn.Module) -> None:
    plan = kept_memory(llama_7b, LoraOptions(rank=RANK), "nf4", torch.bfloat16)
    # Every weight is a multiple of 64 * 256, so nothing is rounded up.
    assert plan.base == LINEAR // 2 + LINEAR // 64 + 4 * LINEAR // (64 * 256) + 2 * OTHER
    trained = 4 * LAYERS * RANK * (4 * (WIDTH + WIDTH) + 3 * (WIDTH + INNER))
    assert (plan.adapter, plan.gradients, plan.optimizer) == (trained, trained, 2 * trained)
    assert plan.total == plan.base + 4 * trained


@pytest.mark.parametrize(
    ("storage", "dtype", "expected"),
    [
        ("bfloat16", torch.bfloat16, 2 * (LINEAR + OTHER)),
        ("float32", torch.float32, 4 * (LINEAR + OTHER)),
        (
            "int8",
            torch.bfloat16,
            LINEAR + 4 * LAYERS * (4 * WIDTH + 2 * INNER + WIDTH) + 2 * OTHER,
        ),
    ],
)
def test_the_base_in_other_storage(
    llama_7b: nn.Module, storage: str, dtype: torch.dtype, expected: int
) -> None:
    assert kept_memory(llama_7b, LoraOptions(rank=RANK), storage, dtype).base == expected


def test_pissa_keeps_what_it_began_from_and_trains_no_more(llama_7b: nn.Module) -> None:
    plain = kept_memory(llama_7b, LoraOptions(rank=RANK), "nf4", torch.bfloat16)
    pissa = kept_memory(llama_7b, LoraOptions(rank=RANK, init="pissa"), "nf4", torch.bfloat16)
    assert pissa.adapter == 2 * plain.adapter
    assert (pissa.gradients, pissa.optimizer) == (plain.gradients, plain.optimizer)


def test_nf4_bytes_are_those_of_the_tensors_that_bitsandbytes_keeps() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(72, 300, generator=torch.Generator().manual_seed(0))
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=True
    )
    kept = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert quantized_bytes((72, 300), "nf4") == kept


@pytest.mark.parametrize("shape", [(72, 300), (16, 31)])  # the second is too small for 8 bits
def test_bytes_of_8_bit_moments_are_those_that_bitsandbytes_keeps(shape: tuple[int, int]) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    parameter = nn.Parameter(torch.ones(shape))
    optimizer = bitsandbytes.optim.AdamW8bit([parameter])
    parameter.grad = torch.ones(shape)
    optimizer.step()
    state = optimizer.state[parameter].items()
    kept = sum(value.nbytes for key, value in state if key not in ("step", "qmap1", "qmap2"))
    assert moments_bytes(parameter.numel(), "adamw-8bit") == kept
    assert moments_bytes(72 * 300, "adamw") == 2 * 4 * 72 * 300
