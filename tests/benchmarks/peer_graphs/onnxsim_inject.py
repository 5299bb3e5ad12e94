"""onnxsim's LoRA injector on GenAI's graph, filled with an adapter.

Run by a Python that has onnxsim:

    python onnxsim_inject.py MODEL.onnx ADAPTER_DIRECTORY OUT.onnx

It injects zeros. The packed q/k/v operator gets A concatenated along the rank and B block-diagonal.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxsim
from safetensors.numpy import load_file

source, adapter, out = (Path(each) for each in sys.argv[1:])
settings = json.loads((adapter / "adapter_config.json").read_text())
rank, scaling = settings["r"], settings["lora_alpha"] / settings["r"]
factors = load_file(adapter / "adapter_model.safetensors")
model = onnx.load(source)
weights = [node.input[1] for node in model.graph.node if node.op_type == "MatMul"]
weights = [name for name in weights if "lm_head" not in name]
if not weights:
    raise SystemExit("it takes fp32 MatMul, Gemm and Conv; this graph has none but the head")
for node in model.graph.node:
    if node.op_type == "SimplifiedLayerNormalization":
        # ONNX Runtime's own operator in ONNX's domain, which the injector's checker does not know.
        node.domain = "com.microsoft"
packed = [name for name in weights if "qkv_proj" in name]
model, first = onnxsim.inject_lora(model, rank=3 * rank, target_names=packed)
model, second = onnxsim.inject_lora(model, rank=rank, target_names=sorted({*weights} - {*packed}))
for node in model.graph.node:
    if node.op_type == "SimplifiedLayerNormalization":
        node.domain = ""
values: dict[str, np.ndarray] = {}
for target in (*first.targets, *second.targets):
    path = target.weight_name.removesuffix(".MatMul.weight").replace(".attn.", ".self_attn.")
    kinds = ("q_proj", "k_proj", "v_proj") if path.endswith("qkv_proj") else (path.split(".")[-1],)
    a, b = [], []
    for kind in kinds:
        key = f"base_model.model.{path.rpartition('.')[0]}.{kind}.lora_"
        a.append(factors[f"{key}A.weight"].T)  # [in, r]
        b.append(factors[f"{key}B.weight"].T * scaling)  # [r, out]
    blocks = np.zeros([sum(sizes) for sizes in zip(*(each.shape for each in b), strict=True)])
    row = column = 0
    for each in b:
        blocks[row : row + each.shape[0], column : column + each.shape[1]] = each
        row, column = row + each.shape[0], column + each.shape[1]
    values[target.lora_a_name] = np.concatenate(a, axis=1)
    values[target.lora_b_name] = blocks
for tensor in model.graph.initializer:
    if tensor.name in values:
        value = values.pop(tensor.name).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
assert not values, sorted(values)
onnx.save(model, out, save_as_external_data=True, location=f"{out.name}.data")
