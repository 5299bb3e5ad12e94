"""Every variant PEFT makes, merged: same outputs as the unmerged adapter and as PEFT's merge."""

import pytest
import torch
from merge_bases import load_merged, save_base
from peft_cases import CASES, UNMERGEABLE, load_with_peft, logits, make, merge_with_peft

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


def test_grouped_convolution_is_refused_by_name(tmp_path, merge_into):
    made = make("conv_grouped", tmp_path / "adapter")
    save_base(made.base, tmp_path / "base")
    with pytest.raises(LoraportError, match=r"grouped\.weight.*2 groups.*loraport export"):
        merge_into(tmp_path / "base", tmp_path / "merged", made.path)
    assert not (tmp_path / "merged").exists()
