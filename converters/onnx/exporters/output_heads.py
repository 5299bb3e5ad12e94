"""The head of a decoder, for GenAI's builder.

Version 0.18 takes every linear module for the head that is as wide as the vocabulary is large, such
as projections of queries or MLPs of that width. Where the configuration says that the head is the
embedding (``tie_word_embeddings``), it looks tokens up in the head, though a checkpoint may hold
two that differ, which transformers leaves apart.
"""

from __future__ import annotations

from typing import Any

import torch


def mend(builders: Any) -> None:
    """Let the builder take a model's own head alone for the head, and its embedding as it is.

    Args:
        builders: The builder's module of that name; changed in place.
    """
    model = builders.Model
    find = model.has_lm_head

    def found(self: Any, module: Any) -> bool:
        own = getattr(self.weights, "get_output_embeddings", lambda: None)()
        return bool(find(self, module)) if own is None else module is own

    model.has_lm_head = found
    look_up = model.make_embedding_lookup

    def looked_up(self: Any, embedding: torch.Tensor, basename: str, head: Any) -> Any:
        weight = getattr(head, "weight", None)
        if isinstance(weight, torch.Tensor) and not torch.equal(weight, embedding):
            self.tied_quantized_embeddings = self.tied_unquantized_embeddings = False
        return look_up(self, embedding, basename, head)

    model.make_embedding_lookup = looked_up
