"""Fingerprints see values and shapes, not storage."""

import pytest
import torch

from loraport.errors import LoraportError
from loraport.fingerprint import BaseFingerprint, fingerprint, hash_weight


def test_dtype_and_layout_do_not_matter():
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert hash_weight(weight) == hash_weight(weight.float())
    assert hash_weight(weight) == hash_weight(weight.T.contiguous().T)


def test_values_and_shape_matter():
    weight = torch.arange(12.0).reshape(3, 4)
    other = weight.clone()
    other[2, 3] += 1e-6 * 12
    assert len({hash_weight(weight), hash_weight(other), hash_weight(weight.reshape(4, 3))}) == 3


def test_long_weights_are_hashed_to_the_end():
    weight = torch.zeros((1 << 22) + 3, dtype=torch.float16)
    other = weight.clone()
    other[-1] = 1
    assert hash_weight(weight) != hash_weight(other)


def test_another_base_is_refused_by_module():
    weights = {"a": torch.zeros(2, 3), "b": torch.ones(2, 3)}
    mine = fingerprint(weights, weights.__getitem__)
    theirs = fingerprint(weights, {**weights, "b": torch.full((2, 3), 2.0)}.__getitem__)
    with pytest.raises(LoraportError) as error:
        mine.require_same_base(theirs, "adapter x", "base y")
    assert "1 of 2 base weights differ" in str(error.value)
    assert "\n  - b: expected base weight" in str(error.value)
    mine.require_same_base(mine, "adapter x", "base y")
    mine.require_same_base(theirs.restricted_to(["a", "unknown"]), "adapter x", "base y")


def test_text_round_trip():
    mine = BaseFingerprint({"a": "00", "b": "ff"})
    assert BaseFingerprint.from_json(mine.to_json()) == mine


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"algorithm": "md5", "modules": {}}', "null"])
def test_foreign_text_is_refused(text):
    with pytest.raises(LoraportError, match="base fingerprint"):
        BaseFingerprint.from_json(text)
