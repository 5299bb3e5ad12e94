"""Store a graph's weights in fewer bits, and see which of them that reached."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import onnx_ir as ir

from converters.onnx.exporters.quantizing import quantize_graph
from converters.onnx.graph.constants import constant
from converters.onnx.graph.site import Site
from converters.onnx.graph.source_graph import read_graph
from converters.onnx.modules.graph_names import name_sites
from converters.onnx.operators import find_site
from loraport.bundle.manifest import MODEL_FILE
from loraport.errors import LoraportError, first_names

_BITS = 8  # of quantized weights whose operator does not say
# Operators whose numbers are of 4 bits where they do not say how wide they are.
_NARROW = ("GatherBlockQuantized", "MatMulBnb4", "MatMulNBits")
_HALVES = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
# What searches for a continuation, with a decoder inside.
_FLOAT32_ALONE = ("BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch")
_NAMED = 5


def store_as(file: Path, out: Path, precision: str, progress: Callable[[str], None]) -> ir.Model:
    """Write ``model.onnx`` with weights in a precision, and return it.

    Args:
        file: Any ``.onnx`` file with float32 weights.
        out: An existing directory without a ``model.onnx``.
        precision: See `quantize_graph`.
        progress: Told what stays as it was.

    Raises:
        LoraportError: If the quantizer fails, or writes no model, or none of the weights could be
            stored so; or if an operator is not computed so.
    """
    quantize_graph(file, out, precision)
    try:
        model = read_graph(out / MODEL_FILE)
    except LoraportError as error:
        if precision == "fp16" and (stored := _stored_outputs(read_graph(file))):
            raise LoraportError(
                f"{file}: --precision fp16: expected outputs that are computed, got stored values: "
                f"{', '.join(stored)}, which ONNX Runtime's converter declares twice; take them "
                "off the outputs, or try int8 or int4"
            ) from error
        reason = str(error).removeprefix(f"{out / MODEL_FILE}: ")
        raise LoraportError(
            f"{file}: --precision {precision}: ONNX Runtime's quantizer wrote something else: "
            f"{reason}; try another precision"
        ) from error
    model.graph.sort()  # the one for fp16 puts casts of inputs last
    sites = sites_of(model)  # without any there is no bundle, for reasons that are told later
    if sites and stored_precision(sites) != precision:
        _require_floats(file, sites, precision)
        operators = ", ".join(sorted({_told(site) for site in sites}))
        other = any(site.dtype is ir.DataType.FLOAT for site in sites)
        remedy = "try another precision" if other else "export the model in float32 first"
        raise LoraportError(
            f"{file}: --precision {precision}: expected operators whose weights ONNX Runtime's "
            f"quantizer stores so, got {operators}, which it leaves as they are; {remedy}"
        )
    kinds = {node.op_type for node in model.graph.all_nodes()} if precision == "fp16" else set()
    if searching := sorted(kinds.intersection(_FLOAT32_ALONE)):
        raise LoraportError(
            f"{file}: --precision fp16: expected operators that ONNX Runtime computes in halves, "
            f"got {', '.join(searching)}, which it has for float32 alone; try int4"
        )
    if precision == "fp16" and (optional := _optional_floats(model)):
        raise LoraportError(
            f"{file}: --precision fp16: expected tensors, got optional ones: "
            f"{', '.join(optional)}, whose type ONNX Runtime's converter leaves float32; try int8 "
            "or int4"
        )
    if precision == "fp16" and (halves := _sequences_of_halves(model)):
        progress(f"sequences of float16 now, where arrays stay float32: {', '.join(halves)}")
    if left := _left(sites, precision):
        progress(f"not stored as {precision}: {first_names(left, _NAMED)}")
    return model


def _require_floats(file: Path, sites: Iterable[Site], precision: str) -> None:
    """Refuse a graph whose weights were rounded to integers before, to others than are asked for.

    Raises:
        LoraportError: Naming what they are.
    """
    found = sorted({_stored(site) for site in sites if site.quantized} - {precision})
    if found:
        raise LoraportError(
            f"{file}: --precision {precision}: expected weights of floats, got some that are "
            f"stored as {' and '.join(found)} already; leave --precision out, or give the model "
            "from before it was quantized"
        )


def sites_of(model: ir.Model) -> list[Site]:
    """Return every operator of a graph that can have a slot."""
    return [site for node in model.graph.all_nodes() if (site := find_site(node)) is not None]


def rounded_modules(sites: Sequence[Site], paths: Collection[str]) -> list[str]:
    """Return which of the modules have weights of integers in a graph, in its order."""
    found = (entry.path for entry in name_sites(sites) if entry.site.quantized)
    return [path for path in dict.fromkeys(found) if path in paths]


def stored_precision(sites: Iterable[Site]) -> str:
    """Return how weights are stored, by the coarsest of them."""
    found = {_stored(site) for site in sites}
    return next((each for each in ("int4", "int8", "bf16", "fp16") if each in found), "fp32")


def _stored(site: Site) -> str:
    if site.quantized:
        bits = 4 if site.node.op_type in _NARROW or _reads_narrow(site) else _BITS
        return "int4" if site.node.attributes.get_int("bits", bits) <= 4 else "int8"
    return _HALVES.get(site.dtype, "fp32")


def _told(site: Site) -> str:
    """Name an operator, with what its weights are where they are not as quantizers take them."""
    plain = site.quantized or site.dtype is ir.DataType.FLOAT
    return site.node.op_type if plain else f"{site.node.op_type} of {site.dtype.numpy().name}"


def _reads_narrow(site: Site) -> bool:
    """Tell whether a weight is dequantized from so few bits, and activations are not rounded too.

    Those of 8 bits are what a graph is held to where it has both.
    """
    known = (constant(value) for value in site.node.inputs)
    before = site.x.producer()
    if before is not None and before.op_type == "DequantizeLinear":
        return False
    return site.x in site.node.inputs and any(each is not None and each.narrow for each in known)


def _stored_outputs(model: ir.Model) -> list[str]:
    """Return the outputs that are initializers."""
    return [str(value.name) for value in model.graph.outputs if value.is_initializer()]


def _optional_floats(model: ir.Model) -> list[str]:
    """Return the inputs and outputs that may be a tensor of float32 or nothing."""
    return [
        str(value.name)
        for value in (*model.graph.inputs, *model.graph.outputs)
        if isinstance(value.type, ir.OptionalType) and value.dtype is ir.DataType.FLOAT
    ]


def _sequences_of_halves(model: ir.Model) -> list[str]:
    """Return the inputs and outputs that are sequences of float16 now."""
    return [
        str(value.name)
        for value in (*model.graph.inputs, *model.graph.outputs)
        if isinstance(value.type, ir.SequenceType) and value.dtype is ir.DataType.FLOAT16
    ]


def _left(sites: Sequence[Site], precision: str) -> list[str]:
    """Return the modules whose weights are stored otherwise, each once, with their operators."""
    found = {
        f"{entry.path} ({_told(entry.site)})": None
        for entry in name_sites(sites)
        if _stored(entry.site) != precision
    }
    return list(found)
