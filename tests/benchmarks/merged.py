"""A merged export of SmolLM2 and an adapter: the way that needs no slots."""

import tempfile
from pathlib import Path

from converters.merge import MergeOptions, make_plan, merge
from converters.onnx.exporters.genai_builder import build_with_genai
from loraport.adapter import Adapter
from loraport.base.finding import resolve_base
from loraport.peft_layout.write import write_peft


def export_merged(adapter: Adapter, out: Path, precision: str) -> None:
    """Merge an adapter into the checkpoint, and export that with the same builder as bundles."""
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        source, merged = Path(scratch) / "adapter", Path(scratch) / "merged"
        write_peft(adapter, source)
        options = MergeOptions(str(resolve_base("smollm2")), ((source, 1.0),), merged)
        merge(options, make_plan(options), lambda _: None)
        build_with_genai(merged, out, precision=precision, provider="cpu")
