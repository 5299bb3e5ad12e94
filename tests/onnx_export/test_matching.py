"""Which modules a site computes: by recorded scope, by node name, by values, never by belief."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from converters.onnx.modules.matching import Matcher, Unmatched
from converters.onnx.modules.slottable import linear_modules
from converters.onnx.operators import find_site


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(6, 8)
        self.k_proj = nn.Linear(6, 4)
        self.v_proj = nn.Linear(6, 4)
        self.o_proj = nn.Linear(8, 6)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(6, 10)
        self.up_proj = nn.Linear(6, 10)
        self.down_proj = nn.Linear(10, 6)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Attention()
        self.mlp = Mlp()


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(6, 9)


@pytest.fixture(scope="module")
def modules():
    torch.manual_seed(0)
    return linear_modules(Decoder())


def weight_of(modules, *paths):
    """The modules' weights side by side, as a graph stores them: ``[in, out]``."""
    return torch.cat([modules[path].weight for path in paths]).T.contiguous().numpy()


def site(weight, name="", scopes=None):
    value = ir.Value(name="w", const_value=ir.tensor(weight))
    node = ir.node("MatMul", [ir.Value(name="x"), value], name=name)
    if scopes is not None:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    return find_site(node)


def paths(matched):
    assert not isinstance(matched, Unmatched), matched.reason
    return [module.path for module in matched]


Q, K, V = (f"layers.1.self_attn.{leaf}_proj" for leaf in "qkv")


def test_by_the_scope_that_torch_records(modules):
    found = site(weight_of(modules, Q), "node_17", f"['', 'layers.1', '{Q}', 'linear']")
    assert paths(Matcher(modules).match(found)) == [Q]


@pytest.mark.parametrize("name", [f"/{Q.replace('.', '/')}/MatMul", "/layers.1/attn/q_proj/MatMul"])
def test_by_the_name_of_the_node(modules, name):
    assert paths(Matcher(modules).match(site(weight_of(modules, Q), name))) == [Q]


def test_a_packed_name_stands_for_modules_side_by_side(modules):
    matcher = Matcher(modules)
    packed = site(weight_of(modules, Q, K, V), "/layers.1/attn/qkv_proj/MatMul")
    assert paths(matcher.match(packed)) == [Q, K, V]
    gate, up = "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"
    packed = site(weight_of(modules, gate, up), "/layers.0/mlp/gate_up_proj/MatMul")
    assert paths(matcher.match(packed)) == [gate, up]


@pytest.mark.parametrize("group", [[Q], [Q, K, V], ["layers.0.mlp.down_proj"], ["lm_head"]])
@pytest.mark.parametrize("name", ["", "/Relu_5", "a/b/c"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_by_values_where_names_are_lost(modules, group, name, dtype):
    found = site(weight_of(modules, *group).astype(dtype), name)
    assert paths(Matcher(modules).match(found)) == group


def test_half_precision_weights_of_a_long_row_match_by_value():
    # Rounding to float16 and then to bfloat16 is not rounding to bfloat16: keys must not rely
    # on it. 600 values hold many where the two differ.
    torch.manual_seed(0)
    modules = linear_modules(nn.ModuleDict({"fc": nn.Linear(600, 3), "other": nn.Linear(600, 3)}))
    found = site(weight_of(modules, "fc").astype(np.float16))
    assert paths(Matcher(modules).match(found)) == ["fc"]


@pytest.mark.parametrize("name", ["/layers.0/attn/q_proj/MatMul", "/layers.1/attn/qkv_proj/MatMul"])
def test_a_name_that_lies_is_not_believed(modules, name):
    # The weight is layer 1's q_proj: the values decide.
    assert paths(Matcher(modules).match(site(weight_of(modules, Q), name))) == [Q]


def test_a_scope_that_lies_is_not_believed(modules):
    lying = site(weight_of(modules, Q), "", f"['', '{K}']")
    assert paths(Matcher(modules).match(lying)) == [Q]


def test_the_reason_says_what_lied(modules):
    unknown = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    matched = Matcher(modules).match(site(unknown, "/layers.1/attn/q_proj/MatMul", f"['{K}']"))
    assert isinstance(matched, Unmatched)
    assert f"the export's metadata says {K}, but the node maps 6 to 8, not 6 to 4" in matched.reason
    assert f"the node's name says {Q}, but the node's weight is not {Q}'s" in matched.reason


def test_a_site_of_another_model_is_unmatched(modules):
    matched = Matcher(modules).match(site(np.ones((5, 7), np.float32), "mystery"))
    assert matched == Unmatched("no module is named or weighted like mystery")


def test_modules_with_the_same_values_are_told_apart_by_name_only():
    twins = nn.ModuleDict({"left": nn.Linear(6, 4), "right": nn.Linear(6, 4)})
    twins["right"].load_state_dict(twins["left"].state_dict())
    modules = linear_modules(twins)
    weight = weight_of(modules, "left")
    assert paths(Matcher(modules).match(site(weight, "/right/MatMul"))) == ["right"]
    nameless = Matcher(modules).match(site(weight))
    assert isinstance(nameless, Unmatched)
    assert "left" in nameless.reason
    assert "right" in nameless.reason


def test_damaged_metadata_is_ignored(modules):
    assert paths(Matcher(modules).match(site(weight_of(modules, Q), "", "[oops"))) == [Q]


def test_conv1d_of_transformers_is_seen_as_out_in():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    modules = linear_modules(nn.ModuleDict({"c_attn": Conv1D(9, 6)}))
    assert (modules["c_attn"].in_features, modules["c_attn"].out_features) == (6, 9)
    assert paths(Matcher(modules).match(site(weight_of(modules, "c_attn")))) == ["c_attn"]


class TestQuantized:
    """A rounded weight is believed by its name when it is near, else the nearest is looked for."""

    def quantize(self, weight, name):
        from onnx import helper
        from onnx_graphs import only_node, single_node

        rows = weight.T  # [N, K]
        k = rows.shape[1]
        padded = np.zeros((len(rows), 16), np.float32)
        padded[:, :k] = rows
        scales = np.abs(padded).max(1) / 7
        q = np.clip(np.round(padded / scales[:, None]) + 8, 0, 15).astype(np.uint8)
        constants = {"s": scales, "q": (q[:, ::2] | q[:, 1::2] << 4).reshape(len(rows), 1, 8)}
        node = helper.make_node(
            "MatMulNBits",
            ["x", "q", "s"],
            ["y"],
            name=name,
            domain="com.microsoft",
            K=k,
            N=len(rows),
            bits=4,
            block_size=16,
        )
        return find_site(only_node(single_node(node, constants, k)))

    def test_near_and_named(self, modules):
        packed = self.quantize(weight_of(modules, Q, K, V), "/layers.1/attn/qkv_proj/MatMul_Q4")
        assert paths(Matcher(modules).match(packed)) == [Q, K, V]

    def test_a_name_that_lies_is_not_believed(self, modules):
        lying = self.quantize(weight_of(modules, Q), "/layers.0/attn/q_proj/MatMul_Q4")
        assert paths(Matcher(modules).match(lying)) == [Q]

    def test_far_from_everything(self, modules):
        other = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
        matched = Matcher(modules).match(self.quantize(other, "/layers.0/attn/q_proj/MatMul_Q4"))
        assert isinstance(matched, Unmatched)
        assert "the node's weight is not layers.0.self_attn.q_proj's" in matched.reason
