"""Export a base once, with slots, as a bundle. No adapter has any part in it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from converters.onnx.exporters.attention_windows import set_attention_windows
from converters.onnx.exporters.genai_builder import (
    PRECISIONS,
    build_with_genai,
    builds,
    why_not_built,
)
from converters.onnx.exporters.input_dimensions import (
    require_dimensions,
    require_named_tensors,
    require_varying,
)
from converters.onnx.exporters.loading import load_exported, require_weights
from converters.onnx.exporters.long_rotations import long_rotations_after
from converters.onnx.exporters.norm_epsilons import set_norm_epsilons
from converters.onnx.exporters.olmo_norms import set_olmo_norms
from converters.onnx.exporters.quantizing import PRECISION_TEXT
from converters.onnx.exporters.quantizing import PRECISIONS as QUANTIZED
from converters.onnx.exporters.rotations import require_rotations
from converters.onnx.exporters.storing import rounded_modules, sites_of, store_as
from converters.onnx.exporters.torch_exporter import export_module
from converters.onnx.graph.provenance import MADE_BY, record_provenance
from converters.onnx.modules.holders import BaseHolders
from converters.onnx.modules.slottable import (
    other_matrices,
    slottable_modules,
    tied_modules,
    unfit_modules,
)
from converters.onnx.slots.inserting import (
    SlotOptions,
    SlottedModel,
    insert_slots,
    require_slot_inputs,
    with_replacements,
)
from loraport.base.computed_weights import weights_stored
from loraport.base.config import architecture, read_model_config
from loraport.base.finding import resolve_base
from loraport.base.loading import load_tokenizer
from loraport.bundle.base_values import write_base_values
from loraport.bundle.golden import record_no_golden
from loraport.bundle.manifest import MODEL_FILE, REQUIRED_MODEL_FILE, Manifest, write_manifest
from loraport.bundle.sources import record_base
from loraport.errors import LoraportError, Problems, first_line
from loraport.fingerprint import fingerprint
from loraport.option_checks import (
    as_path,
    check_parts,
    check_switches,
    check_text,
    given_or_default,
)
from loraport.output import new_directory
from loraport.parity.tolerances import golden_tolerance, golden_tolerances
from loraport.runtime import Runtime
from loraport.runtime.decoder import GENAI_CONFIG, first_step_inputs, read_decoder
from loraport.runtime.recording import write_base_golden

GOLDEN_TEXT = "The port keeps its light on."
_ENCODER_TEXTS = ("The port keeps its light on.", "Ships swap their cargo here.")
_AS_IT_IS, _BF16 = "fp32", "bf16"
_LEFT_OUT_HEAD = "left out, as the output head; export again with --lm-head"


@dataclass(frozen=True)
class ExportOptions:
    """How a base is exported.

    Attributes:
        precision: Of the base's weights: ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``int4``.
        provider: Execution provider the graph is made for: ``cpu`` or ``cuda``.
        lm_head: Put a slot beside the output head too.
        slots: What the slots can take.
    """

    precision: str = "fp32"
    provider: str = "cpu"
    lm_head: bool = False
    slots: SlotOptions = field(default_factory=SlotOptions)

    def __post_init__(self) -> None:
        problems = Problems()
        check_text(problems, "precision", self.precision, PRECISION_TEXT)
        if not isinstance(self.provider, str) or self.provider not in PRECISIONS:
            problems.add("provider", " or ".join(PRECISIONS), repr(self.provider))
        check_switches(problems, self, "lm_head")
        check_parts(problems, self, slots=SlotOptions)
        problems.raise_if_any("export options cannot be used")


Progress = Callable[[str], None]


def _silent(text: str) -> None:
    del text


def export_base(
    base: Path | str,
    out: Path | str,
    options: ExportOptions | None = None,
    *,
    force: bool = False,
    progress: Progress = _silent,
    finish: Callable[[Path], None] = lambda bundle: None,  # noqa: ARG005
) -> None:
    """Export a base model as a bundle.

    A decoder that ONNX Runtime GenAI's model builder makes as it is goes through it, anything else
    through ``torch.onnx.export``.

    Args:
        base: Directory, ``.gguf`` file, hub name or ``smollm2``.
        out: The new bundle; appears whole or not at all.
        options: See `ExportOptions`.
        force: Replace an existing bundle.
        progress: Told what is being done.
        finish: Called with the bundle while it still has its temporary name, e.g. to add
            adapters, so that the bundle appears with them or not at all.

    Raises:
        LoraportError: If the base cannot be exported this way.
    """
    options = given_or_default(options, ExportOptions)
    base, out = str(base), as_path("the output", out)
    directory = resolve_base(base)
    decoder = builds(architecture(directory), read_model_config(directory), options.precision)
    allowed = PRECISIONS[options.provider] if decoder else (_AS_IT_IS, *QUANTIZED)
    if options.precision not in allowed:
        reason = ""
        if options.precision == _BF16:
            reason = "; ONNX Runtime's CPU kernels have no bfloat16"
        raise LoraportError(
            f"precision: expected {' or '.join(allowed)} for "
            f"{read_model_config(directory).get('architectures')} on {options.provider}, "
            f"got {options.precision}{reason}"
        )
    with new_directory(out, force=force) as bundle:
        if decoder:
            require_weights(directory)
            load_tokenizer(str(directory))  # what it lacks is told before the minutes of a build
            progress(f"building the {options.precision} graph with ONNX Runtime GenAI")
            build_with_genai(
                directory, bundle, precision=options.precision, provider=options.provider
            )
            model = load_exported(directory, progress)
        else:
            progress(
                "exporting the graph with torch.onnx.export"
                + _without_cache(directory, options.precision)
            )
            model = load_exported(directory, progress)
            # The graph has one step; a cache is no tensor. What also sees has a part for text.
            for config in (model.config, model.config.get_text_config()):
                if getattr(config, "use_cache", False):
                    config.use_cache = False
            inputs = encoder_inputs(base, model)
            dynamic = {name: {0: "batch", 1: "sequence"} for name in inputs}
            _export_encoder(model, inputs, bundle, dynamic, options.precision, progress)
            load_tokenizer(str(directory)).save_pretrained(bundle)
        progress("putting in the slots")
        _slot_and_describe(bundle, model, options, base_name=_base_name(base, directory))
        record_base(bundle, str(directory.resolve()))
        progress("recording golden outputs")
        if options.precision == _BF16:
            record_no_golden(bundle, "ONNX Runtime's CPU kernels have no bfloat16")
        elif decoder:
            write_base_golden(bundle, _decoder_golden_inputs)
        else:
            write_base_golden(bundle, {name: t.numpy() for name, t in inputs.items()})
        finish(bundle)


def export_torch_module(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    out: Path | str,
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    slots: SlotOptions | None = None,
    base_name: str = "",
    force: bool = False,
) -> None:
    """Export any torch module as a bundle with a slot on every linear layer.

    Args:
        module: What to export; put into evaluation mode.
        inputs: An example of every tensor argument of ``forward`` by name; an argument that is
            no tensor needs a module around this one that gives it.
        out: The new bundle; appears whole or not at all.
        dynamic: Input name → dimension → its name; the first dimension as ``batch`` unless told.
        slots: What the slots can take; LoRA on linear layers unless told.
        base_name: What the base calls itself.
        force: Replace an existing bundle.

    Raises:
        LoraportError: If it does not run with the inputs, torch cannot export it, it has no
            linear layer, or it takes one size alone of a dimension that was given a name.
    """
    if not isinstance(module, nn.Module):
        raise LoraportError(f"the module: expected a torch.nn.Module, got {type(module).__name__}")
    require_named_tensors(inputs)
    asked = dynamic is not None
    if dynamic is None:
        dynamic = {name: {0: "batch"} for name in inputs}
    else:
        require_dimensions(dynamic, inputs)
    with new_directory(as_path("the output", out), force=force) as bundle:
        options = ExportOptions(slots=given_or_default(slots, SlotOptions, "slots"))
        with weights_stored(module.eval()):
            _export_attention(module, inputs, bundle, dynamic)
            if asked:
                require_varying(bundle / MODEL_FILE, dynamic)
            name = base_name or type(module).__name__
            _slot_and_describe(bundle, module, options, base_name=name)
        write_base_golden(bundle, {name: tensor.numpy() for name, tensor in inputs.items()})


def encoder_inputs(base: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return example inputs of an encoder: two tokenized sentences.

    Raises:
        LoraportError: If the model takes something else, or there is no tokenizer.
    """
    expected = f"base {base}: expected a model that takes tokens alone, got {type(model).__name__}"
    remedy = "export it from Python with converters.onnx.export_torch_module, or as an .onnx file"
    main_input = getattr(model, "main_input_name", "input_ids")
    if main_input != "input_ids":
        raise LoraportError(f"{expected}, which takes {main_input}; {remedy}")
    tokenizer = load_tokenizer(base)
    pads = tokenizer.pad_token is not None  # GPT-2's cannot
    rows = [tokenizer(text)["input_ids"] for text in _ENCODER_TEXTS]
    encoded = tokenizer(
        list(_ENCODER_TEXTS),
        padding=pads,
        truncation=not pads,
        max_length=None if pads else min(map(len, rows)),
        return_tensors="pt",
    )
    accepted = _forward_arguments(model)
    inputs = {name: tensor for name, tensor in encoded.items() if name in accepted}
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:  # whatever the model's own code raises where an input lacks
        first = first_line(error)
        raise LoraportError(f"{expected}, which fails with them: {first}; {remedy}") from error
    return inputs


def _export_encoder(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    out: Path,
    dynamic: Mapping[str, Mapping[int, str]],
    precision: str,
    progress: Progress,
) -> None:
    if precision == _AS_IT_IS:
        _export_attention(model, inputs, out, dynamic)
        return
    with tempfile.TemporaryDirectory(dir=out) as exact:
        _export_attention(model, inputs, Path(exact), dynamic)
        graph = store_as(Path(exact) / MODEL_FILE, out, precision, progress)
    if rounded := rounded_modules(sites_of(graph), other_matrices(model)):
        progress(
            f"stored as {precision} too, by which other experts may be chosen: {rounded[0]}"
            + (f" and {len(rounded) - 1} more" if rounded[1:] else "")
        )


def _export_attention(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    out: Path,
    dynamic: Mapping[str, Mapping[int, str]],
) -> None:
    """Export with torch's own attention; with transformers' plain one where that cannot be."""
    try:
        export_module(model, inputs, out, dynamic=dynamic)
    except LoraportError as refused:
        choose = getattr(model, "set_attn_implementation", None)
        if choose is None:
            raise
        own = getattr(getattr(model, "config", None), "_attn_implementation", None)
        try:
            choose("eager")
            export_module(model, inputs, out, dynamic=dynamic)
        except (LoraportError, ValueError):
            raise refused from None
        finally:
            if own is not None:
                choose(own)


def _without_cache(directory: Path, precision: str) -> str:
    """Say what a decoder goes without that torch exports, and why."""
    name = architecture(directory)
    if not name.endswith("ForCausalLM"):
        return ""
    reason = why_not_built(name, read_model_config(directory), precision)
    return (
        f": ONNX Runtime GenAI's builder {reason}, so the graph takes whole texts, without a cache"
    )


def _forward_arguments(model: nn.Module) -> Iterable[str]:
    import inspect

    return inspect.signature(model.forward).parameters


def _slot_and_describe(
    bundle: Path, model: nn.Module, options: ExportOptions, *, base_name: str
) -> None:
    modules = slottable_modules(model)
    head = _head_path(model)

    def exclude(path: str) -> str | None:
        return _LEFT_OUT_HEAD if path == head and not options.lm_head else None

    graph = ir.load(bundle / MODEL_FILE)
    if (bundle / GENAI_CONFIG).is_file():
        set_attention_windows(graph, model.config)
        require_rotations(graph, model)
        set_norm_epsilons(graph, model)
        set_olmo_norms(graph, model)
    slotted = insert_slots(graph, modules, options.slots, exclude=exclude)
    holders = BaseHolders.of_module(slotted.model.graph, model)
    slotted = with_replacements(slotted, options.slots, holders)
    record_provenance(slotted.model, base_name)
    save_graphs(slotted, bundle)
    write_base_values(bundle, slotted.base_values)
    covered = [path for path in slotted.slots.modules() if path in modules]
    manifest = Manifest(
        base_name=base_name,
        fingerprint=fingerprint(covered, lambda path: _stored_weight(model, path)),
        precision=options.precision,
        slots=replace(slotted.slots, tied=tied_modules(modules)),
        unslotted={**slotted.unslotted, **unfit_modules(model)},
        tolerance=golden_tolerance(options.precision),
        tolerances=golden_tolerances(options.precision),
        made_by=MADE_BY,
        long_rotations_after=long_rotations_after(slotted.model),
    )
    files = sorted(f.relative_to(bundle).as_posix() for f in bundle.rglob("*") if f.is_file())
    write_manifest(manifest.with_files(bundle, files), bundle)


def save_graphs(slotted: SlottedModel, bundle: Path) -> None:
    """Write ``model.onnx`` and ``model.required.onnx`` over the data file that is there."""
    ir.save(slotted.model, bundle / MODEL_FILE)
    require_slot_inputs(slotted.model, slotted.slots)
    ir.save(slotted.model, bundle / REQUIRED_MODEL_FILE)


def _stored_weight(model: nn.Module, path: str) -> torch.Tensor:
    weight = model.get_submodule(path).weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _head_path(model: nn.Module) -> str | None:
    """Return the path of the output head, or ``None`` if the model has none."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if head is None:
        return None
    return next((path for path, module in model.named_modules() if module is head), None)


def _decoder_golden_inputs(runtime: Runtime) -> dict[str, np.ndarray]:
    bundle = runtime.directory
    token_ids = load_tokenizer(str(bundle))(GOLDEN_TEXT)["input_ids"]
    return first_step_inputs(runtime, read_decoder(bundle), token_ids)


def _base_name(base: str, directory: Path) -> str:
    """Return how the base is called, without a path of the machine it lies on."""
    return directory.name if Path(base).exists() else base
