"""Parity with PyTorch on the same device: the protocol, an encoder, rows with own adapters."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from converters.onnx import ExportOptions, add_adapters, export_base
from converters.onnx.modules.graph_weights import load_graph_weights
from gpu_sections.place import ROWS, Place, Row, adapters
from loraport.base.finding import resolve_base
from loraport.base.loading import load_model
from loraport.bundle.manifest import MODEL_FILE, read_manifest
from loraport.parity import tolerance_for, verify_bundle
from loraport.parity.changes import changes_of
from loraport.parity.reference import adapted, torch_outputs
from loraport.parity.rounding import Rounding, allowed_beside, wider
from loraport.parity.verification import default_samples
from loraport.runtime import Runtime

QUANTIZED = ("int4", "int8")


def parity(place: Place) -> Iterator[Row]:
    """The whole protocol against PyTorch on the same device, then rows, per precision."""
    for precision in place.precisions:
        bundle = place.bundle(precision)
        runtime = Runtime(bundle, provider=place.device, check=False)
        model = load_model(place.base)
        original = {name: value.detach().clone() for name, value in model.named_parameters()}
        if precision in QUANTIZED:
            load_graph_weights(bundle / MODEL_FILE, model)
        report = verify_bundle(
            bundle,
            model.to(place.device),
            adapters(runtime.manifest, 2),
            provider=place.device,
            original=original.__getitem__,
        )
        yield from verdict(f"parity {precision}", report)
        yield parity_of_rows(place, precision, model, original)


def parity_of_rows(place: Place, precision: str, model: Any, original: dict[str, Any]) -> Row:
    """A batch of which every row has another adapter, against PyTorch with each of them."""
    bundle = place.bundle(precision, per_row=True)
    runtime = Runtime(bundle, provider=place.device, check=False, float32_activations=True)
    made = adapters(runtime.manifest, ROWS - 1)
    names = [None, *made]  # one row is the base
    sample = default_samples(runtime)[0]
    batch = {k: np.repeat(np.asarray(v), ROWS, axis=0) for k, v in sample.session.items()}
    got = runtime.rows(list(made)).run(batch, names, ["logits"])["logits"].astype(np.float32)
    expected, allowed = [], tolerance_for(precision, place.device)
    rounding = Rounding(model, allowed.floats) if allowed.floats != "float32" else None
    for name in names:
        parts = [] if name is None else [(made[name], 1.0)]
        changes = changes_of(parts, model, original.__getitem__)
        with adapted(model, changes):
            expected.append(torch_outputs(model, sample.torch)[0][0])
        own = rounding.measure([sample.torch], changes) if rounding is not None else None
        if own is not None:
            allowed = wider(allowed, allowed_beside(allowed, own))
    far = [float(np.abs(row - other).max()) for row, other in zip(got, expected, strict=True)]
    apart = min(float(np.abs(one - other).max()) for i, one in enumerate(got) for other in got[:i])
    bound = allowed.max_abs
    figure = (
        f"{ROWS} rows, logits at most {max(far):.2g} from torch, rows at least {apart:.2g} apart"
    )
    if not max(far) <= bound < apart:
        figure = f"FAILED {figure}"
    return Row(f"parity {precision}: rows with adapters of their own", figure, f"allowed {bound:g}")


def encoder(place: Place) -> Iterator[Row]:
    """A sentence encoder's shape in float32, exported by torch.onnx: GenAI has none for CUDA."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(resolve_base(place.base))
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
    vocabulary = len(tokenizer)
    model = BertModel(BertConfig(vocab_size=vocabulary, num_hidden_layers=6, **sizes)).eval()
    directory, bundle = place.scratch / "encoder", place.scratch / "encoder-bundle"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    export_base(str(directory), bundle, ExportOptions(precision="fp32"))
    made = adapters(read_manifest(bundle), 2)
    add_adapters(bundle, made)
    report = verify_bundle(bundle, model.to(place.device), made, provider=place.device)
    yield from verdict("parity fp32, TF32 off, encoder", report)


def verdict(title: str, report: Any) -> Iterator[Row]:
    """Sum a verification up; each check that failed is a line."""
    passed = [check for check in report.checks if check.passed]
    far = max(
        (c.comparison.max_abs for c in passed if " = torch" in c.name and c.comparison), default=0
    )
    figure = f"{len(passed)} of {len(report.checks)} checks, outputs at most {far:.2g} apart"
    yield Row(title, figure, f"allowed {report.tolerance.max_abs:g}")
    for check in report.checks:
        if check.name.startswith("every node on") or "twice that" in check.detail:
            yield Row(f"{title}: {check.name}", check.detail)
        if not check.passed:
            found = check.comparison.max_abs if check.comparison else ""
            yield Row(f"{title}: {check.name}", f"FAILED {check.detail} {found}")
