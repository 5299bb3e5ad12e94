"""The data files of a bundle that is made from somebody's model: linked, never rewritten.

A hard link costs no room and no time. Where one is impossible (another file system), the file is
copied; so it is where that is asked for, since onnx's own reader refuses a file with two names.
Weights that lie in the graph itself go into a data file of their own, so that ``model.onnx`` and
``model.required.onnx`` share them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from converters.onnx.graph.source_graph import MappedTensor, data_locations
from loraport.bundle.base_values import BASE_VALUES_FILE
from loraport.bundle.golden import GOLDEN_DIRECTORY
from loraport.bundle.manifest import MANIFEST_FILE, MODEL_FILE, REQUIRED_MODEL_FILE
from loraport.errors import Problems, first_names

_OWN_DATA = "model.onnx.data"
_OWN_NAMES = (MODEL_FILE, REQUIRED_MODEL_FILE, MANIFEST_FILE, BASE_VALUES_FILE, "sources.json")
_OWN_DIRECTORIES = (GOLDEN_DIRECTORY, "adapters")
_GENAI = "genai_config.json"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
)
_NAMED = 3
# What is smaller stays in the graph: shapes and the like, which shape inference reads.
_SMALLEST_OUTSIDE = 1024


def share_data(
    model: ir.Model,
    source: Path,
    bundle: Path,
    progress: Callable[[str], None],
    *,
    copy: bool = False,
) -> list[str]:
    """Link a model's data files into a bundle, where the graph looks for them.

    Args:
        model: As `read_graph` gave it.
        source: The model's directory.
        bundle: An existing directory.
        progress: Told of files that had to be copied, and of those that are shared.
        copy: Copy them all.

    Returns:
        The files.

    Raises:
        LoraportError: If a data file has the name of a file that the bundle itself has.
    """
    locations = data_locations(model)
    problems = Problems()
    for location in locations:
        first = Path(location).parts[0]
        if location in _OWN_NAMES or first in _OWN_DIRECTORIES:
            problems.add(location, "a data file of another name", "one a bundle has itself")
    problems.raise_if_any("the model's data cannot lie in a bundle")
    shared = []
    for location in locations:
        target = bundle / location
        target.parent.mkdir(parents=True, exist_ok=True)
        # Caches keep files as symbolic links: it is the file itself that is shared.
        real = (source / location).resolve()
        if copy:
            progress(f"copying {location}")
            shutil.copyfile(real, target)
            continue
        try:
            os.link(real, target)
        except OSError:
            progress(f"copying {location}, which cannot be linked")
            shutil.copyfile(real, target)
        else:
            shared.append(location)
    if shared:
        progress(
            f"shared with the model, by hard links: {first_names(shared, _NAMED)}; onnx.load "
            "refuses to read such files for either, --copy-data copies them"
        )
    return locations


def copy_companions(file: Path, bundle: Path) -> None:
    """Copy the tokenizer and GenAI's configuration, where they lie beside the model."""
    names = _TOKENIZER + ((_GENAI,) if file.name == MODEL_FILE else ())
    for name in names:
        if (file.parent / name).is_file() and not (bundle / name).exists():
            shutil.copyfile(file.parent / name, bundle / name)


def move_weights_out(model: ir.Model, bundle: Path) -> None:
    """Move the weights that lie in the graph into a data file of the bundle's own, in place."""
    name = _OWN_DATA
    while (bundle / name).exists():
        name = f"own.{name}"
    values = [
        value
        for graph in (model.graph, *model.graph.subgraphs())
        for value in graph.initializers.values()
        if _belongs_outside(value.const_value)
    ]
    if not values:
        return
    offset = 0
    with (bundle / name).open("wb") as stream:
        for value in values:
            tensor = value.const_value
            assert tensor is not None
            data = tensor.tobytes()
            offset += stream.write(b"\0" * (-offset % 64))
            value.const_value = MappedTensor(
                name,
                offset,
                len(data),
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=tensor.name or "",
                base_dir=str(bundle),
            )
            offset += stream.write(data)


def _belongs_outside(tensor: ir.TensorProtocol | None) -> bool:
    if tensor is None or isinstance(tensor, ir.ExternalTensor):
        return False
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes >= _SMALLEST_OUTSIDE
