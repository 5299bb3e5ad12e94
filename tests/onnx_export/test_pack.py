"""Packing: the slots' tensors are the adapter, and whatever does not fit is named, all of it."""

import hashlib

import numpy as np
import pytest
import torch

from converters.onnx.packing.pack import adapter_sha256, pack
from loraport.adapter import Adapter, LoraModule, ModuleKind, Replacement
from loraport.bundle.slots import Slot, SlotMember, SlotTable
from loraport.errors import LoraportError

Q, K, V, DOWN = "h.0.q_proj", "h.0.k_proj", "h.0.v_proj", "h.0.down_proj"
IN = 6
WIDTHS = {Q: 8, K: 4, V: 5}


def table(dtype="FLOAT"):
    members, start = [], 0
    for path, width in WIDTHS.items():
        members.append(SlotMember(path, start, start + width))
        start += width
    packed = Slot("h.0.q_proj+k_proj+v_proj", IN, start, dtype, tuple(members))
    return SlotTable((packed, Slot(DOWN, 9, IN, dtype, (SlotMember(DOWN, 0, IN),))))


def module(rank, n_in, n_out, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return LoraModule(
        options.pop("kind", ModuleKind.LINEAR),
        torch.randn(rank, n_in, generator=generator),
        torch.randn(n_out, rank, generator=generator),
        alpha=options.pop("alpha", 5),
        **options,
    )


def qkv(*paths):
    return {
        path: module(rank, IN, WIDTHS[path], seed=rank, use_rslora=path == V)
        for rank, path in enumerate(paths, start=2)
    }


def delta_float64(adapted):
    """scaling * B A, from the definition."""
    rank = adapted.lora_A.shape[0]
    scaling = adapted.alpha / (rank**0.5 if adapted.use_rslora else rank)
    return scaling * adapted.lora_B.double().numpy() @ adapted.lora_A.double().numpy()


@pytest.mark.parametrize("paths", [(Q, K, V), (Q, V), (K,), (V, Q)])
def test_a_packed_slot_holds_each_module_in_its_own_columns(paths):
    modules = qkv(*paths)
    packed = pack(Adapter(modules), table(), {})
    name = "h.0.q_proj+k_proj+v_proj"
    assert packed.tensors.keys() == {f"{name}.lora_A", f"{name}.lora_B"}
    a, b = (packed.tensors[f"{name}.lora_{part}"].double().numpy() for part in "AB")
    rank = sum(adapted.rank for adapted in modules.values())
    assert a.shape == (IN, rank)
    assert b.shape == (rank, sum(WIDTHS.values()))
    assert packed.ranks == {name: rank}
    for member in table().slots[0].members:
        got = (a @ b)[:, member.start : member.stop]
        if member.module_path in modules:
            expected = delta_float64(modules[member.module_path]).T
            # B is rounded to float32 once after the scaling; products of norm 1.
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
            assert np.abs(got).max() > 0.1
        else:
            assert not got.any()


@pytest.mark.parametrize(("dtype", "relative"), [("FLOAT16", 1e-3), ("BFLOAT16", 8e-3)])
def test_half_precision_slots_round_once(dtype, relative):
    modules = {DOWN: module(3, 9, IN, alpha=7)}
    packed = pack(Adapter(modules), table(dtype), {})
    a, b = packed.tensors[f"{DOWN}.lora_A"], packed.tensors[f"{DOWN}.lora_B"]
    torch_dtype = torch.float16 if dtype == "FLOAT16" else torch.bfloat16
    assert a.dtype == b.dtype == torch_dtype
    scaled = (modules[DOWN].lora_B * torch.tensor(7 / 3, dtype=torch.float32)).T
    assert torch.equal(b, scaled.to(torch_dtype))
    got, expected = (a.double() @ b.double()).numpy(), delta_float64(modules[DOWN]).T
    assert np.linalg.norm(got - expected) <= relative * np.linalg.norm(expected)


def _spread(shape, size, seed):
    """Elements of both signs between size / 2 and size, so that bounds hold for each."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return size * signs * (torch.rand(shape, generator=generator) / 2 + 0.5)


# Where alpha / r times B, or A as it is, leaves what float16 holds in full, below or above.
@pytest.mark.parametrize(
    ("size_a", "size_b", "alpha"),
    [(0.5, 1e-5, 0.25), (0.5, 2e-5, -0.5), (1e-2, 3.0, 1e6), (1e-6, 200.0, 2.0), (1e5, 1e-2, 2.0)],
)
def test_float16_slots_keep_the_precision_of_small_and_large_factors(size_a, size_b, alpha):
    modules = {
        Q: LoraModule(
            ModuleKind.LINEAR, _spread((2, 6), size_a, 0), _spread((8, 2), size_b, 1), alpha
        ),
        V: module(3, IN, 5),  # beside it in the slot, and as it was
    }
    packed = pack(Adapter(modules), table("FLOAT16"), {})
    name = "h.0.q_proj+k_proj+v_proj"
    a, b = packed.tensors[f"{name}.lora_A"], packed.tensors[f"{name}.lora_B"]
    assert a.dtype == b.dtype == torch.float16
    assert torch.equal(a[:, 2:], modules[V].lora_A.T.half())
    assert torch.equal(b[2:, 12:], (modules[V].lora_B * (5 / 3)).T.half())
    wide_a, wide_b = modules[Q].lora_A.double().T, modules[Q].lora_B.double().T * alpha / 2
    got, expected = a[:, :2].double() @ b[:2, :8].double(), wide_a @ wide_b
    room = (wide_a.abs() @ wide_b.abs()) * 2**-9  # A and B, rounded to 11 bits each, and float32
    assert ((got - expected).abs() <= room).all()
    alone = wide_a.half().double() @ wide_b.half().double()
    assert not ((alone - expected).abs() <= room).all()


def test_scalings_are_reported_per_module():
    packed = pack(Adapter(qkv(Q, V)), table(), {})
    assert packed.scalings == {Q: 5 / 2, V: pytest.approx(5 / 3**0.5)}


def test_everything_that_does_not_fit_is_named_at_once():
    magnitude = torch.ones(8)
    adapter = Adapter(
        {
            "h.9.q_proj": module(2, IN, 8),
            "lm_head": module(2, IN, 8),
            K: module(2, IN, 5),
            Q: module(2, IN, 8, magnitude=magnitude),
            DOWN: module(2, 9, IN, lora_B_bias=torch.ones(IN)),
            "embed": module(2, 30, IN, kind=ModuleKind.EMBEDDING),
            V: module(2, 7, 5),
        },
        {
            "score.weight": Replacement(torch.ones(2, IN)),
            "embed.weight": Replacement(torch.ones(1, IN), rows=(3,)),
        },
    )
    with pytest.raises(LoraportError) as refused:
        pack(adapter, table(), {"lm_head": "left out, as the output head"})
    merge = "merge the adapter and export that"
    for line in (
        "h.9.q_proj: expected a slot for this module, got none; "
        "the exported model has no such module",
        "lm_head: expected a slot for this module, got none; left out, as the output head",
        f"{K}: expected in and out features (6, 4), got (6, 5)",
        f"{Q}: expected a slot with a gain, got DoRA; "
        f"export again with gain among --slots, or {merge}",
        f"{DOWN}: expected a slot with a bias, got lora_bias; "
        f"export again with bias among --slots, or {merge}",
        "embed: expected a slot for this module, got none; "
        f"export again with embedding among --slots, or {merge}",
        f"{V}: expected in and out features (6, 5), got (7, 5)",
        "score.weight: expected a slot for this parameter, got none, and the adapter stores it as "
        "a whole (modules_to_save or a trained bias); "
        f"export again with --replace score, or {merge}",
    ):
        assert f"  - {line}" in str(refused.value)
    assert str(refused.value).count("\n  - ") == 9


def test_slots_of_the_shape_whose_names_a_tool_lost_are_told():
    lost = [
        Slot("Attention_0_qkv", IN, 3 * IN, "FLOAT", (SlotMember("Attention_0_qkv", 0, 3 * IN),)),
        Slot("node_MatMul_7", IN, IN, "FLOAT", (SlotMember("node_MatMul_7", 0, IN),)),
        Slot("node_MatMul_9", IN + 1, IN, "FLOAT", (SlotMember("node_MatMul_9", 0, IN),)),
        Slot(Q, IN, IN, "FLOAT", (SlotMember(Q, 0, IN),)),
    ]
    adapter = Adapter(
        {
            Q: module(2, IN, IN),
            K: module(2, IN, IN),
            V: module(2, IN, 2 * IN),
            DOWN: module(2, IN, 3 * IN + 1),
        }
    )
    with pytest.raises(LoraportError) as refused:
        pack(adapter, SlotTable(tuple(lost)), {})
    remedy = (
        "which would take it; where a tool lost the names, export again with --base, "
        "which tells them"
    )
    none = "expected a slot for this module, got none; the exported model has no such module"
    assert str(refused.value).split("\n  - ")[1:] == [
        f"{K}: {none} by this name, and the adapter none for Attention_0_qkv and 1 more, " + remedy,
        f"{V}: {none} by this name, and the adapter none for Attention_0_qkv, {remedy}",
        f"{DOWN}: {none}",
    ]


def test_slots_that_together_are_a_module_are_told():
    """Without a base nothing says that a tool took the module apart."""
    leaves = ("attn.q", "attn.k", "mlp.gate", "mlp.up")
    paths = [f"h.{layer}.{leaf}" for layer in (0, 1) for leaf in leaves]
    widths = [5, 3, 4, 4] * 2
    slots = tuple(
        Slot(path, IN, width, "FLOAT", (SlotMember(path, 0, width),))
        for path, width in zip(paths, widths, strict=True)
    )
    sizes = {"h.1.mlp.gate_up": 8, "h.1.self.qk": 8, "h.1.mlp.other": 9}
    adapter = Adapter({path: module(2, IN, size) for path, size in sizes.items()})
    with pytest.raises(LoraportError) as refused:
        pack(adapter, SlotTable(slots), {})
    none = "expected a slot for this module, got none; the exported model has no such module"
    remedy = "with as many outputs; if they are it, export again with --base, which tells that"
    assert str(refused.value).split("\n  - ")[1:] == [
        f"h.1.mlp.gate_up: {none}, but h.1.mlp.gate and h.1.mlp.up {remedy}",
        f"h.1.self.qk: {none}, but h.1.attn.q and h.1.attn.k {remedy}",
        f"h.1.mlp.other: {none}",
    ]


@pytest.mark.parametrize("path", [f"wrapped.{Q}", Q.partition(".")[2]])
def test_a_name_that_a_wrapper_changed_is_recognized(path):
    with pytest.raises(LoraportError) as refused:
        pack(Adapter({path: module(2, IN, 8)}), table(), {})
    expected = f"{path}: expected a slot for this module, got none; the exported model calls it {Q}"
    assert f"{expected}; export again with --base" in str(refused.value)


def test_an_embedding_whose_operator_has_no_slot_is_not_to_be_asked_for_again():
    adapter = Adapter({"embed": module(2, 30, IN, kind=ModuleKind.EMBEDDING)})
    reason = "Gather: its rows of integers are not only dequantized, all by one scale"
    with pytest.raises(LoraportError) as refused:
        pack(adapter, table(), {"/embed/Gather": reason})
    expected = f"has none by this name, and no slot beside /embed/Gather ({reason})"
    assert expected in str(refused.value)
    assert "--slots" not in str(refused.value)


def test_why_a_slot_has_no_gain_is_said():
    adapter = Adapter({Q: module(2, IN, 8, magnitude=torch.ones(8))})
    with pytest.raises(LoraportError) as refused:
        pack(adapter, table(), {f"{Q}.lora_gain": "its bias is fixed"})
    expected = f"{Q}: expected a slot with a gain, got DoRA; its bias is fixed; merge the adapter"
    assert expected in str(refused.value)


def test_a_convolution_is_refused_by_its_kind():
    conv = LoraModule(ModuleKind.CONV, torch.ones(2, IN, 3), torch.ones(8, 2, 1), alpha=1)
    with pytest.raises(LoraportError, match="expected an update of a linear module, got conv"):
        pack(Adapter({Q: conv}), table(), {})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(value):
    adapted = module(2, IN, 8)
    adapted.lora_A[0, 0] = value
    with pytest.raises(LoraportError, match=r"\.lora_A: expected finite numbers as FLOAT, got 1"):
        pack(Adapter({Q: adapted}), table(), {})


def test_values_that_half_precision_cannot_hold_are_refused():
    adapted = module(2, IN, 8, alpha=1e6)
    with pytest.raises(LoraportError, match=r"\.lora_B: expected finite numbers as FLOAT16"):
        pack(Adapter({Q: adapted}), table("FLOAT16"), {})
    pack(Adapter({Q: adapted}), table("FLOAT"), {})


def test_an_adapter_without_modules_is_refused():
    with pytest.raises(LoraportError, match="low-rank updates or whole parameters, got none"):
        pack(Adapter({}), table(), {})


class TestSha256:
    def test_the_same_adapter_hashes_alike_in_any_order(self):
        modules = qkv(Q, K)
        backwards = dict(reversed(modules.items()))
        assert adapter_sha256(Adapter(modules)) == adapter_sha256(Adapter(backwards))

    @pytest.mark.parametrize(
        "other",
        [
            {Q: module(2, IN, 8, alpha=6)},
            {Q: module(2, IN, 8, use_rslora=True)},
            {Q: module(2, IN, 8, seed=1)},
            {K: module(2, IN, 8)},
            {Q: module(2, IN, 8, magnitude=torch.ones(8))},
        ],
    )
    def test_whatever_changes_the_maths_changes_the_hash(self, other):
        assert adapter_sha256(Adapter({Q: module(2, IN, 8)})) != adapter_sha256(Adapter(other))

    def test_replacements_count(self):
        modules = {Q: module(2, IN, 8)}
        one = Adapter(modules, {"score.weight": Replacement(torch.ones(2, 3))})
        two = Adapter(modules, {"score.weight": Replacement(torch.zeros(2, 3))})
        hashes = {adapter_sha256(adapter) for adapter in (one, two, Adapter(modules))}
        assert len(hashes) == 3
        assert all(len(digest) == hashlib.sha256().digest_size * 2 for digest in hashes)
