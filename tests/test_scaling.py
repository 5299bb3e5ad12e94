"""Scaling and patterns, against PEFT's own functions."""

import math
import re

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


PATHS = [
    *("model.layers.1.q_proj", "model.layers.11.q_proj", "q_proj", "xq_proj", "a.xq_proj"),
    *("model.layersX1.q_proj", "model.layers.1.1Xq_proj", "", "model.layers.1."),
]
PATTERNS = [
    "q_proj",
    "layers.1.q_proj",
    r".*\.1\.q_proj",
    "^model.layers.11.q_proj",
    "proj",
    "x?q_proj",
    r"layers\.1\.q_proj",
    r"model\.layers.1\.q_proj",
    "^q_proj",
    "^.q_proj",
    "...q_proj",
    "",
]


@given(st.lists(st.sampled_from(PATTERNS), unique=True), st.sampled_from(PATHS))
def test_patterns_match_as_in_peft(patterns, path):
    values = {pattern: number for number, pattern in enumerate(patterns, start=1)}
    ours = RankAndAlpha(r=99, lora_alpha=98, rank_pattern=values, alpha_pattern=values)
    key = get_pattern_key(values.keys(), path)
    assert ours.rank(path) == values.get(key, 99)
    assert ours.alpha(path) == values.get(key, 98)


def test_patterns_of_thousands_of_modules_are_tried_once_each(monkeypatch):
    paths = [f"model.layers.{n // 64}.mlp.experts.{n % 64}.up_proj" for n in range(2000)]
    values = {
        r"layers\.\d+\.q_proj": 1,
        **{path if n % 2 else re.escape(path): n + 2 for n, path in enumerate(paths)},
    }
    compiled = []
    plain_compile = re.compile
    monkeypatch.setattr(re, "compile", lambda *a: compiled.append(a) or plain_compile(*a))
    monkeypatch.setattr(re, "match", None)
    ranks = RankAndAlpha(r=99, rank_pattern=values)
    assert [ranks.rank(path) for path in paths] == list(range(2, 2002))
    assert ranks.rank("layers.12.q_proj") == 1
    assert ranks.rank("layers.x.q_proj") == 99
    assert len(compiled) == 1  # the one that is more than a path


def test_broken_pattern_is_named():
    with pytest.raises(LoraportError, match=r"pattern '\('"):
        RankAndAlpha(rank_pattern={"(": 2}).rank("fc")
