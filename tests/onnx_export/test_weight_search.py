"""Rounded weights without names belong to the nearest module, or to none, with the reason."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from converters.onnx.modules.slottable import linear_modules, slottable_modules
from converters.onnx.modules.weight_distance import weight_distance
from converters.onnx.modules.weight_search import WeightSearch
from converters.onnx.operators import find_site

IN = 32
LEAVES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        for leaf, out in zip(LEAVES, (24, 8, 8, 40, 40), strict=True):
            setattr(self, leaf, nn.Linear(IN, out, bias=False))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList([Block() for _ in range(3)])})


def weight_of(modules, *paths):
    return torch.cat([modules[path].weight for path in paths]).T.contiguous().numpy()


def n_bits(weight, bits, block=16):
    """A MatMulNBits node over the rounded weight, made by hand."""
    rows = weight.T.reshape(weight.shape[1], -1, block)
    half = 1 << (bits - 1)
    scales = np.abs(rows).max(-1, keepdims=True) / (half - 1)
    q = np.clip(np.round(rows / scales) + half, 0, 2 * half - 1).astype(np.uint8)
    per_byte = 8 // bits
    packed = np.zeros((*q.shape[:-1], block // per_byte), np.uint8)
    for place in range(per_byte):
        packed |= q[..., place::per_byte] << (place * bits)
    inputs = [ir.Value(name="x")]
    for name, array in (("q", packed), ("s", scales.astype(np.float32).reshape(-1))):
        inputs.append(ir.Value(name=name, const_value=ir.tensor(array)))
    inputs[2].dtype = ir.DataType.FLOAT
    sizes = {"K": weight.shape[0], "N": weight.shape[1], "bits": bits, "block_size": block}
    return find_site(ir.node("MatMulNBits", inputs, sizes, domain="com.microsoft"))


def q_dq(weight, per_column):
    scale = np.abs(weight).max(0 if per_column else None) / 127
    q = np.round(weight / scale).astype(np.int8)
    values = [
        ir.Value(name="q", const_value=ir.tensor(q)),
        ir.Value(name="s", const_value=ir.tensor(np.asarray(scale, np.float32))),
    ]
    dequantize = ir.node("DequantizeLinear", values)
    return find_site(ir.node("MatMul", [ir.Value(name="x"), dequantize.outputs[0]]))


ROUNDED = {
    "4 bits": lambda weight: n_bits(weight, 4),
    "8 bits": lambda weight: n_bits(weight, 8),
    "2 bits": lambda weight: n_bits(weight, 2),
    "int8": lambda weight: q_dq(weight, per_column=False),
    "int8 per column": lambda weight: q_dq(weight, per_column=True),
}


@pytest.mark.parametrize("form", ROUNDED)
@pytest.mark.parametrize("leaves", [("k_proj",), ("q_proj", "k_proj", "v_proj"), LEAVES[3:]])
def test_the_nearest_modules_are_found_alone_and_packed(model, form, leaves):
    modules = linear_modules(model)
    search = WeightSearch(modules.values())
    for layer in range(3):
        paths = [f"layers.{layer}.{leaf}" for leaf in leaves]
        found = search.find(ROUNDED[form](weight_of(modules, *paths)))
        assert not isinstance(found, str), found
        assert [module.path for module in found] == paths


@pytest.mark.parametrize("form", ROUNDED)
def test_a_weight_of_another_model_is_none(model, form):
    modules = linear_modules(model)
    other = np.random.default_rng(1).standard_normal((IN, 8)).astype(np.float32) * 0.1
    found = WeightSearch(modules.values()).find(ROUNDED[form](other))
    assert found == "no module is named or weighted like this operator"


def test_two_that_are_nearly_as_near_are_told():
    torch.manual_seed(0)
    twins = nn.ModuleDict({"left": nn.Linear(IN, 8), "right": nn.Linear(IN, 8)})
    twins["right"].load_state_dict(twins["left"].state_dict())
    with torch.no_grad():
        twins["right"].weight += 1e-3 * torch.randn(8, IN)
    modules = linear_modules(twins)
    search = WeightSearch(modules.values())
    found = search.find(ROUNDED["4 bits"](weight_of(modules, "left")))
    assert found == ("nearly the same weights belong to left, right, and no name tells them apart")
    # 8 bits tell them apart, and so do the exact values.
    exact = ir.Value(name="w", const_value=ir.tensor(weight_of(modules, "right")))
    site = find_site(ir.node("MatMul", [ir.Value(name="x"), exact]))
    assert [module.path for module in search.find(site)] == ["right"]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_that_was_not_rounded_to_the_nearest_is_near_enough(model, kind):
    """Converters raise what float16 cannot hold to its smallest value."""
    import ml_dtypes

    modules = linear_modules(model)
    weight = weight_of(modules, "layers.1.k_proj")
    numpy_kind = np.float16 if kind is torch.float16 else ml_dtypes.bfloat16
    half = weight.astype(numpy_kind)
    half[0, 0] = np.nextafter(half[0, 0], np.array(1, numpy_kind), dtype=numpy_kind)
    value = ir.Value(name="w", const_value=ir.tensor(half))
    site = find_site(ir.node("MatMul", [ir.Value(name="x"), value]))
    assert site.dtype == (ir.DataType.FLOAT16 if kind is torch.float16 else ir.DataType.BFLOAT16)
    found = WeightSearch(modules.values()).find(site)
    assert [module.path for module in found] == ["layers.1.k_proj"]


def test_a_float32_weight_must_be_the_modules_own(model):
    modules = linear_modules(model)
    weight = weight_of(modules, "layers.1.k_proj") * np.float32(1 + 1e-4)
    value = ir.Value(name="w", const_value=ir.tensor(weight))
    site = find_site(ir.node("MatMul", [ir.Value(name="x"), value]))
    assert isinstance(WeightSearch(modules.values()).find(site), str)


def test_the_distance_is_the_relative_frobenius_norm(monkeypatch):
    import converters.onnx.modules.weight_distance as module_under_test

    # In pieces of three rows.
    monkeypatch.setattr(module_under_test, "_PIECE_ELEMENTS", 3 * IN)
    torch.manual_seed(0)
    (module,) = slottable_modules(nn.ModuleDict({"fc": nn.Linear(IN, 8)})).values()
    other = np.random.default_rng(0).standard_normal((IN, 8)).astype(np.float32)
    own = module.weight.double().numpy()
    expected = np.linalg.norm(own - other.T) / np.linalg.norm(own)
    assert weight_distance(module, other) == pytest.approx(expected, rel=1e-6)
    assert weight_distance(module, own.T.astype(np.float32)) == 0
    assert weight_distance(module, other[:, :7]) == float("inf")


@pytest.mark.parametrize("steps", [127, 7, 1])
@pytest.mark.parametrize("axis", ["", "outputs", "inputs"])
def test_a_rounded_weight_with_factors_is_another(steps, axis):
    """A normalization folded in before quantizing, or smoothing: the update lacks the factors."""
    torch.manual_seed(0)
    (module,) = slottable_modules(nn.ModuleDict({"fc": nn.Linear(64, 48)})).values()
    weight = module.weight.float().numpy().T
    factors = np.random.default_rng(0).uniform(0.4, 1.2, weight.shape).astype(np.float32)
    factor = {"": 1.0, "outputs": factors[:1], "inputs": factors[:, :1]}[axis]
    scale = np.abs(weight * factor).max(0) / steps
    rounded = (np.round(weight * factor / scale) * scale).astype(np.float32)
    apart = np.linalg.norm(rounded - weight) / np.linalg.norm(weight)
    distance = weight_distance(module, rounded)
    if axis and steps > 1:  # to two bits, factors are lost in the rounding
        assert apart < 0.5
        assert distance == float("inf")
    elif not axis:
        assert distance == pytest.approx(apart, rel=1e-5)
