"""Quality against adapter size as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraport.sweep.result import SweepResult


def draw_quality(result: SweepResult, path: Path) -> None:
    """Draw every candidate's validation loss over the size of its adapter.

    Args:
        result: What to draw.
        path: The ``.png`` or ``.svg`` to write.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shown = [line for line in result.candidates if line.validation_loss is not None]
    loss = {line.name: line.validation_loss or 0.0 for line in shown}
    for rate in sorted({line.learning_rate for line in shown}):
        points = [line for line in shown if line.learning_rate == rate]
        color = None
        for marker, name, chosen in (
            ("o", f"learning rate {rate:g}", [line for line in points if not line.ended]),
            ("x", f"learning rate {rate:g}, ended early", [line for line in points if line.ended]),
        ):
            if not chosen:
                continue
            sizes = [line.adapter_bytes / 1e6 for line in chosen]
            losses = [loss[line.name] for line in chosen]
            (drawn,) = axes.plot(sizes, losses, marker, color=color, linestyle="", label=name)
            color = drawn.get_color()
    taken = next(line for line in shown if line.taken)
    x, y = [taken.adapter_bytes / 1e6], [loss[taken.name]]
    label = f"take {taken.name}"
    axes.plot(x, y, "o", markersize=15, fillstyle="none", color="black", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("adapter, MB")
    axes.set_ylabel("validation loss")
    axes.set_title(f"base alone: {result.base_validation_loss:.4f}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    kind = path.suffix[1:]
    # An equal result has an equal picture: by itself an SVG has a date and names that are drawn.
    with rc_context({"svg.hashsalt": "loraport"}):
        figure.savefig(path, format=kind, metadata={"Date": None} if kind == "svg" else None)
