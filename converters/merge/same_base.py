"""An adapter is merged into the base it was trained on, unless forced."""

from __future__ import annotations

import math
from collections.abc import Sequence

from converters.merge.base import BaseCheckpoint
from converters.merge.layout import BaseLayout
from converters.merge.sources import open_files
from converters.merge.targets import NamedAdapter
from loraport.errors import LoraportError
from loraport.fingerprint import fingerprint
from loraport.naming import weight_name


def require_same_base(
    base: BaseCheckpoint, layout: BaseLayout, adapters: Sequence[NamedAdapter]
) -> None:
    """Compare the base's weights with the fingerprint each adapter carries, if any.

    Raises:
        LoraportError: If a weight differs; the modules are named.
    """
    import torch

    index, sources = layout.index(), base.sources()
    with open_files() as files:

        def weight(module_path: str) -> torch.Tensor:
            (parameter,) = index.candidates(weight_name(module_path))
            source = sources[layout.pieces[parameter][0].tensor]
            flat = source.read(files, 0, math.prod(source.shape))
            return flat.reshape(source.shape)

        for each in adapters:
            recorded = each.adapter.base_fingerprint
            if recorded is None:
                continue
            known = [
                path
                for path in recorded.modules
                if len(found := index.candidates(weight_name(path))) == 1
                and len(layout.pieces.get(found[0], ())) == 1
            ]
            try:
                recorded.require_same_base(
                    fingerprint(known, weight), str(each.path), str(base.directory)
                )
            except LoraportError as error:
                raise LoraportError(f"{error}\nor force it with --ignore-fingerprint") from error
