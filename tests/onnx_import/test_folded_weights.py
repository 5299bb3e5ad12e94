"""A rounded kernel that a normalization was folded into is told from the base's own."""

import warnings

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from converters.onnx import add_adapters
from converters.onnx.importing import ImportOptions, import_model
from converters.onnx.slots.inserting import SlotOptions
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.bundle.manifest import read_manifest
from loraport.errors import LoraportError


class Convolved(torch.nn.Module):
    def __init__(self, gains):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 12, 3, bias=False)
        self.norm, self.last = torch.nn.BatchNorm2d(12), torch.nn.Conv2d(12, 9, 1)
        self.norm.weight.data = gains

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.conv(x))))


class Images:
    """What a quantizer calibrates with."""

    def __init__(self):
        self._left = [{"x": np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype(np.float32)}]

    def get_next(self):
        return self._left.pop() if self._left else None


def rounded(file, kind):
    """Write a graph's weights in float16, or quantized per channel; return the new file."""
    out = file.with_name("rounded.onnx")
    if kind == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(file)), out)
        return out
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quantize_static(
        file,
        out,
        Images(),
        quant_format=QuantFormat[kind],
        per_channel=True,
        weight_type=QuantType.QInt8,
    )
    return out


@pytest.mark.filterwarnings("ignore")  # of the exporter and the quantizer, about themselves
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("kind", ["QDQ", "QOperator", "fp16"])
def test_a_base_that_is_named_later_tells_rounded_kernels_too(kind, folded, tmp_path):
    """They have no hash: an adapter of the kernel as it was was packed, wrong by the factors."""
    torch.manual_seed(0)
    gains = torch.linspace(0.4, 1.2, 12) if folded else torch.ones(12)
    model = Convolved(gains).eval()
    x = (torch.randn(2, 3, 6, 6),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, x, tmp_path / "m.onnx", input_names=["x"], dynamo=False)
    base = tmp_path / "base"
    base.mkdir()
    save_file(model.state_dict(), base / "model.safetensors")
    (base / "config.json").write_text("{}")
    bundle = tmp_path / "out"
    options = ImportOptions(slots=SlotOptions(("conv",)))
    import_model(rounded(tmp_path / "m.onnx", kind), bundle, options)
    assert read_manifest(bundle).computed == ("conv",)
    a, b = torch.randn(2, 3, 3, 3), torch.randn(12, 2, 1, 1)
    adapter = {"a": Adapter({"conv": LoraModule(ModuleKind.CONV, a, b, alpha=2)})}
    if folded:
        with pytest.raises(LoraportError, match=r"conv: expected .* of .*base, rounded, got"):
            add_adapters(bundle, adapter, base=base)
        assert not read_manifest(bundle).adapters
        add_adapters(bundle, adapter, ignore_fingerprint=True)
    else:  # what it multiplies by is lost in the rounding
        add_adapters(bundle, adapter, base=base)
        with pytest.raises(LoraportError, match="conv: expected the module's own weight"):
            add_adapters(bundle, adapter, force=True)
    assert list(read_manifest(bundle).adapters) == ["a"]


@pytest.mark.parametrize("bias", ["conv.weight_bias", "conv.bias"])
def test_what_a_quantizer_wrote_of_a_fused_kernel_is_told(bias, tmp_path):
    """`QLinearConv` has nothing recorded: only the name of the bias tells of the fusion."""
    make, random = onnx.helper, np.random.default_rng(0)
    kernel = random.normal(size=(12, 3, 3, 3)).astype(np.float32)
    stored = [
        onnx.numpy_helper.from_array(kernel, "conv.weight"),
        onnx.numpy_helper.from_array(kernel[:, 0, 0, 0], bias),
    ]
    node = make.make_node("Conv", ["x", "conv.weight", bias], ["y"], name="node_Conv_3")
    ends = [
        make.make_tensor_value_info("x", 1, ["n", 3, 6, 6]),
        make.make_tensor_value_info("y", 1, ["n", 12, 4, 4]),
    ]
    graph = make.make_graph([node], "g", ends[:1], ends[1:], stored)
    file = tmp_path / "m.onnx"
    opsets = [make.make_opsetid("", 15)]
    onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=8), file)
    options = ImportOptions(slots=SlotOptions(("conv",)))
    import_model(rounded(file, "QOperator"), tmp_path / "out", options)
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest.slots.modules()) == ["conv"]
    assert manifest.computed == (("conv",) if bias == "conv.weight_bias" else ())
