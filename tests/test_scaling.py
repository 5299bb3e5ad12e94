"""Scaling and patterns, against PEFT's own functions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from loraport.errors import LoraportError
from loraport.scaling import RankAndAlpha, alpha_for, lora_scaling

RANKS = st.integers(1, 4096)
ALPHAS = st.floats(-1e6, 1e6).filter(lambda alpha: abs(alpha) > 1e-6)


@given(RANKS, ALPHAS)
def test_scaling_is_pefts_formula(rank, alpha):
    assert lora_scaling(rank, alpha) == alpha / rank
    assert lora_scaling(rank, alpha, use_rslora=True) == alpha / math.sqrt(rank)


@given(RANKS, ALPHAS, st.booleans())
def test_alpha_for_inverts_scaling(rank, scaling, use_rslora):
    alpha = alpha_for(rank, scaling, use_rslora=use_rslora)
    again = lora_scaling(rank, alpha, use_rslora=use_rslora)
    assert again == pytest.approx(scaling, rel=4e-16)  # two float64 operations


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_below_one_is_refused(rank):
    with pytest.raises(LoraportError, match=f"at least 1, got {rank}"):
        lora_scaling(rank, 8)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_alpha_that_is_no_number_is_refused(alpha):
    with pytest.raises(LoraportError, match="finite"):
        lora_scaling(8, alpha)


PATHS = ["model.layers.1.q_proj", "model.layers.11.q_proj", "q_proj", "xq_proj", "a.xq_proj"]
PATTERNS = [
    "q_proj",
    "layers.1.q_proj",
    r".*\.1\.q_proj",
    "^model.layers.11.q_proj",
    "proj",
    "x?q_proj",
]


@given(st.permutations(PATTERNS), st.sampled_from(PATHS))
def test_patterns_match_as_in_peft(patterns, path):
    values = {pattern: number for number, pattern in enumerate(patterns, start=1)}
    ours = RankAndAlpha(r=99, lora_alpha=98, rank_pattern=values, alpha_pattern=values)
    key = get_pattern_key(values.keys(), path)
    assert ours.rank(path) == values.get(key, 99)
    assert ours.alpha(path) == values.get(key, 98)


def test_broken_pattern_is_named():
    with pytest.raises(LoraportError, match=r"pattern '\('"):
        RankAndAlpha(rank_pattern={"(": 2}).rank("fc")
