"""Why operators with weights of their own get no slot."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from converters.onnx.graph.constants import constant
from converters.onnx.graph.product_in_floats import cuts_its_product_off
from converters.onnx.graph.site import gives_only_its_shape
from converters.onnx.modules.weight_origins import MULTIPLYING, WeightOrigins, only_multiplies
from converters.onnx.operators import einsum, gather

# Operators that use a matrix for something that no adapter changes.
_NO_WEIGHTS = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Where",
        "Concat",
        "Gather",
        "GatherND",
        "GatherElements",
        "ScatterND",
        "ScatterElements",
        "Slice",
        "Split",
        "Reshape",
        "Expand",
        "Tile",
        "Pad",
        "Resize",
        "Equal",
        "Less",
        "Greater",
        "And",
        "Or",
        "Not",
        "Clip",
        "Min",
        "Max",
        "Identity",
        "Transpose",
        "Cast",
        "CastLike",
        "DequantizeLinear",
        "QuantizeLinear",
        "Unsqueeze",
        "Squeeze",
        "Constant",
        "Shape",
        "Range",
        "Cos",
        "Sin",
        "Exp",
        "Neg",
        "Sqrt",
        "Reciprocal",
        "Tanh",
        "Sigmoid",
        "Softmax",
        "GroupQueryAttention",
        "RotaryEmbedding",
        "If",
        "Loop",
        "Scan",
        "QLinearAdd",
        "QLinearMul",
        "LessOrEqual",
        "GreaterOrEqual",
        "Flatten",
        "Mod",
        "PRelu",
        "LayerNormalization",
        "SkipLayerNormalization",
        "Compress",
        "MultiHeadAttention",
        "Sum",
        "TopK",
        "BatchNormalization",
        "ReduceSum",
        "ArgMax",
    ]
)
# Operators of scikit-learn's and the like, with their weights in attributes.
_LEARNED = frozenset(
    [
        "LinearClassifier",
        "LinearRegressor",
        "SVMClassifier",
        "SVMRegressor",
        "TreeEnsemble",
        "TreeEnsembleClassifier",
        "TreeEnsembleRegressor",
    ]
)
_BLOCKED = "com.microsoft.nchwc"
_VECTORS = frozenset(("MatMul", "MatMulBnb4", "MatMulFpQ4"))  # a vector is a weight, or packed one
_LOOKING_UP = frozenset(("Gather", "GatherElements", "GatherND"))
# Whatever computes their weights: exporters put those of gates together, or normalize them.
_NEVER = frozenset(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM", "ConvTranspose"))
_INSIDE = (
    "cannot be taken out: its mask's shape is unknown or of a kind of its own, or it rotates or "
    "shares its cache; export without attention fusion"
)
_OTHER_CHAIN = "its input is not quantized right before it, or its product not scaled after"
_CUT_OFF = (
    "its integers have no numbers below or above zero, as where an activation is folded in; "
    "quantize in the format QDQ"
)
_REASONS = {
    "LSTM": "a recurrent layer's projections are inside the operator",
    "GRU": "a recurrent layer's projections are inside the operator",
    "RNN": "a recurrent layer's projections are inside the operator",
    "DynamicQuantizeLSTM": "a recurrent layer's projections are inside the operator",
    "FusedConv": "its activation is of an unknown kind",
    "FusedGemm": "its activation is of an unknown kind, or its other factor is transposed",
    "MatMulBnb4": "its weight is no constant, of an unknown kind, not turned as usual or torn",
    "MatMulNBits": "its weight is no constant, reordered (g_idx), not of 2, 4 or 8 bits, or torn",
    "MatMulInteger": _OTHER_CHAIN,
    "ConvInteger": _OTHER_CHAIN,
    "ConvTranspose": "transposed convolutions have no slots",
    "Attention": f"its projection {_INSIDE}",
    "QAttention": f"its projection {_INSIDE}",
    "PackedAttention": "its projection is inside the operator; fuse the attention as "
    "MultiHeadAttention (--use_multi_head_attention) before it is converted to packing mode",
    "EmbedLayerNormalization": "the embedding is fused with its normalization",
}


def reasons(nodes: Collection[ir.Node], taken: set[int]) -> dict[str, str]:
    """Say of each operator with a matrix of its own, or larger, or a product with a vector, why.

    Args:
        nodes: The graph's operators.
        taken: ``id`` of the operators that have one.

    Returns:
        The operator's name → why.
    """
    found: dict[str, str] = {}
    origins = WeightOrigins(nodes)
    for node in nodes:
        if id(node) in taken or (node.op_type in _NO_WEIGHTS and not _is_embedding(node)):
            continue
        shapes = [known.shape for value in node.inputs if (known := constant(value)) is not None]
        name = node.name or (node.outputs[0].name or "") or node.op_type
        if node.domain == "ai.onnx.ml" and node.op_type in _LEARNED:
            found[name] = (
                f"{_operator(node)}: its weights are attributes, not constants of the graph"
            )
            continue
        least = 1 if node.op_type in _VECTORS or einsum.sums_constant(node) else 2
        if node.op_type in _NEVER or any(len(shape) >= least for shape in shapes):
            found[name] = _reason(node, shapes)
        elif node.op_type in MULTIPLYING:
            weight = node.inputs[1]
            if weight is not None and constant(weight) is None:
                why = origins.why_not_stored(weight)
                found |= {name: f"{node.op_type}: {why}"} if why else {}
    return found


def _is_embedding(node: ir.Node) -> bool:
    return node.op_type in _LOOKING_UP and (gather.holds_rounded_rows(node) or _is_table(node))


def _is_table(node: ir.Node) -> bool:
    """Tell whether a run picks what is read of a constant of floats with rows.

    Not what it picks of several matrices to multiply with: those products are told themselves.
    """
    table = constant(node.inputs[0])
    if table is None or constant(node.inputs[1]) is not None:
        return False
    sizes = [size for size in table.shape if size != 1]
    if len(sizes) < 2 or not table.dtype.is_floating_point():
        return False
    return len(sizes) == 2 or not only_multiplies(node.outputs[0])


def _operator(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _reason(node: ir.Node, shapes: list[tuple[int, ...]]) -> str:
    operator = _operator(node)
    empty = next((shape for shape in shapes if len(shape) > 1 and 0 in shape), None)
    if empty is not None:
        return f"{operator}: its constant of shape {empty} is empty"
    if gives_only_its_shape(node.outputs[0]):
        return f"{operator}: nothing but the shape of what it computes is read"
    if node.domain == _BLOCKED:
        why = "its kernel lies in blocks made for one kind of processor"
        return f"{operator}: {why}; save the model at ONNX Runtime's level ORT_ENABLE_EXTENDED"
    if cuts_its_product_off(node):
        return f"{operator}: {_CUT_OFF}"
    if node.op_type in _REASONS:
        return f"{operator}: {_REASONS[node.op_type]}"
    if node.op_type in ("MatMul", "Gemm", "FusedMatMul"):
        if constant(node.inputs[0]) is not None:
            return f"{operator}: its constant is the left factor"
        if node.attributes.get_int("transA", 0):
            return f"{operator}: its other factor is transposed"
        return f"{operator}: its constant of shape {shapes[-1]} is no matrix of floats"
    if node.op_type in _LOOKING_UP and _is_table(node):
        axis = node.attributes.get_int("axis", 0)
        how = f"along axis {axis}" if node.op_type == "Gather" else "by coordinates"
        what = f"it reads its constant of shape {shapes[0]} {how}"
        return f"{operator}: {what}; a Gather of a matrix along axis 0 takes a slot"
    if node.op_type == "Gather":
        return "Gather: its rows of integers are not only dequantized, all by one scale"
    if node.op_type == "Einsum" and all(len(shape) < 2 for shape in shapes):
        return f"Einsum: its constant of shape {shapes[-1]} is no matrix of floats"
    if node.op_type == "Einsum":
        return "Einsum: its equation is more than a product of rows with a matrix"
    if node.op_type == "Conv":
        return "Conv: its kernel is not of one to three dimensions"
    return f"{operator}: loraport has no slot for this operator"
