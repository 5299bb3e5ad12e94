"""Names by which a checkpoint's tensors are known for codes of a quantization.

Its ``config.json`` says so as well, where it is there and whole.
"""

from __future__ import annotations

from collections.abc import Container

# What is stored in the place of ``weight``: GPTQ's and AWQ's, compressed-tensors', HQQ's, AQLM's.
_CODES = ("qweight", "weight_packed", "W_q", "codes")


def named_as_codes(name: str) -> bool:
    """Tell whether a tensor is named as a quantization's codes are.

    >>> named_as_codes("fc.qweight"), named_as_codes("fc.weight")
    (True, False)
    """
    return name.rpartition(".")[2] in _CODES or name.endswith("_blocks")


def stored_codes(parameter: str, names: Container[str]) -> str | None:
    """Return the tensor that holds a parameter's codes, if there is one.

    Args:
        parameter: A parameter that is not stored itself.
        names: What is stored, named as in the model.
    """
    module, _, leaf = parameter.rpartition(".")
    found = [f"{parameter}_blocks"]
    if leaf == "weight":
        found += [f"{module}.{each}" for each in _CODES]
    return next((name for name in found if name in names), None)


def told_of(dtype: str, quantized: str | None) -> tuple[str, str]:
    """Return what a weight that is no float is called in an error, and what to do about it.

    Args:
        dtype: What it is stored as.
        quantized: The quantization that the base's ``config.json`` tells of, if it does.

    >>> told_of("I8", "fp8")
    ('stored as I8', 'merge into the float model it was made from')
    """
    remedy = "merge into the float model it was made from"
    if quantized is not None:
        return f"stored as {dtype}", remedy
    return (
        f"stored as {dtype}, of which no config.json tells",
        f"give the directory with the config.json that it was saved with, or {remedy}",
    )
