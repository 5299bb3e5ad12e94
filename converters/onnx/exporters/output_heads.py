"""The head of a decoder, for GenAI's builder.

Version 0.18 takes every linear module for the head that is as wide as the vocabulary is large, such
as projections of queries or MLPs of that width.
"""

from __future__ import annotations

from typing import Any


def mend(builders: Any) -> None:
    """Let the builder take a model's own head alone for the head.

    Args:
        builders: The builder's module of that name; changed in place.
    """
    model = builders.Model
    find = model.has_lm_head

    def found(self: Any, module: Any) -> bool:
        own = getattr(self.weights, "get_output_embeddings", lambda: None)()
        return bool(find(self, module)) if own is None else module is own

    model.has_lm_head = found
