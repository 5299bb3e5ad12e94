"""Every variant PEFT makes, merged: same outputs as the unmerged adapter and as PEFT's merge."""

import pytest
import torch
from merge_bases import load_merged, save_base, write_adapter
from peft_cases import (
    CASES,
    UNMERGEABLE,
    Case,
    load_with_peft,
    logits,
    make,
    make_case,
    merge_with_peft,
)
from safetensors.torch import load_file, save_file

from converters.formats.registry import read_adapter
from loraport.errors import LoraportError

# PEFT merges into the one tensor of a tied pair, which changes the other one's use of it too,
# or adds the update twice.
PEFT_MERGES_WRONGLY = {
    "tied_embedding",
    "tied_head",
    "tied_together",
    "tied_tokens_and_head",
    "tokens_of_both_stacks",
    "tied_tokens_of_the_head",
    "conv1d_storage_and_head",  # GPT-2 ties its head
}


@pytest.mark.parametrize("name", [name for name in CASES if name not in UNMERGEABLE])
def test_merged_is_the_adapter(name, tmp_path, merge_into):
    made = make(name, tmp_path / "adapter")
    save_base(made.base, tmp_path / "base", max_shard_size="20KB")
    merge_into(tmp_path / "base", tmp_path / "merged", made.path)
    got = logits(load_merged(made, tmp_path / "merged"))
    unmerged = logits(load_with_peft(made.fresh_base(), made.path))
    # float32 on both sides, relative to outputs of the size of `scale`.
    scale = max(1.0, unmerged.abs().max().item())
    assert torch.allclose(got, unmerged, rtol=0, atol=1e-5 * scale)
    assert (got - logits(made.base)).abs().max() > 1e-3
    if name not in PEFT_MERGES_WRONGLY:
        peft = logits(merge_with_peft(made))
        assert torch.allclose(got, peft, rtol=0, atol=1e-5 * scale)


class Attention(torch.nn.Module):
    """torch's own attention, whose three projections are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = torch.nn.MultiheadAttention(12, 2, batch_first=True)
        self.fc = torch.nn.Linear(12, 5)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc(self.self_attn(hidden, hidden, hidden, need_weights=False)[0])


def test_torch_s_own_attention_is_left_to_peft(tmp_path, merge_into):
    """Its projections are one parameter, and PEFT adds the update of the output's twice."""
    options = {"target_modules": ["self_attn", "fc"], "r": 3, "lora_alpha": 5}
    made = make_case(Case(Attention, options), tmp_path / "adapter")
    tensors = load_file(made.path / "adapter_model.safetensors")
    key = "base_model.model.self_attn.base_layer.out_proj.lora_{}.weight"
    update = 5 / 3 * tensors[key.format("B")] @ tensors[key.format("A")]
    name = "self_attn.out_proj.weight"
    change = merge_with_peft(made).state_dict()[name] - made.base.state_dict()[name]
    torch.testing.assert_close(change, 2 * update, rtol=1e-5, atol=1e-6)
    (tmp_path / "base").mkdir()
    save_file(made.base.state_dict(), tmp_path / "base" / "model.safetensors")
    message = r"self_attn: expected.*torch\.nn\.MultiheadAttention.*merge it with PEFT"
    with pytest.raises(LoraportError, match=message):
        merge_into(tmp_path / "base", tmp_path / "merged", made.path)
    with pytest.raises(LoraportError, match=message):
        read_adapter(made.path)  # nor can it be converted


def test_grouped_convolution_is_refused_by_name(tmp_path, merge_into):
    made = make("conv_grouped", tmp_path / "adapter")
    save_base(made.base, tmp_path / "base")
    with pytest.raises(LoraportError, match=r"grouped\.weight.*2 groups.*loraport export"):
        merge_into(tmp_path / "base", tmp_path / "merged", made.path)
    assert not (tmp_path / "merged").exists()


def test_the_counter_of_a_batch_norm_is_the_one_adapter_s(tmp_path, merge_into):
    """PEFT stores it beside the statistics; of several adapters, or of a part of one, none is."""
    made = make("batch_norms", tmp_path / "adapter")
    save_base(made.base, tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    merge_into(tmp_path / "base", tmp_path / "merged", made.path)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, wanted in merge_with_peft(made).state_dict().items():
        torch.testing.assert_close(merged[name], wanted, rtol=1e-6, atol=1e-7)
    assert merged["seen.num_batches_tracked"] == stored["seen.num_batches_tracked"] + 7
    merge_into(tmp_path / "base", tmp_path / "half", (made.path, 0.5))
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert torch.equal(half["seen.num_batches_tracked"], stored["seen.num_batches_tracked"])
    mean = "seen.running_mean"
    torch.testing.assert_close(half[mean], (stored[mean] + merged[mean]) / 2)
    with pytest.raises(LoraportError, match=r"running_var: expected a variance of zero or more"):
        merge_into(tmp_path / "base", tmp_path / "wrong", (made.path, -3.0))


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        (("fc.weight_g", "fc.weight_v"), "fc.weight_g and fc.weight_v"),
        (("fc.weight_orig",), "fc.weight_orig"),
        (
            ("fc.parametrizations.weight.original0", "fc.parametrizations.weight.original1"),
            "fc.parametrizations.weight.original0 and fc.parametrizations.weight.original1",
        ),
    ],
)
def test_a_weight_that_is_normed_in_every_pass_is_told_as_that(stored, shown, tmp_path, merge_into):
    write_adapter(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file({name: torch.ones(4, 6) for name in stored}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(LoraportError) as raised:
        merge_into(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter")
    assert f"none: the model computes it from {shown} in every pass; save" in str(raised.value)
