"""Which base an adapter belongs to, by content.

A fingerprint holds one hash per module weight, so an adapter for a few modules can be
compared with an export that has slots on many: the modules both know must agree. The hash
is taken over the values as little-endian float32, so a bfloat16 or float16 checkpoint and
the same weights loaded as float32 hash alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraport.errors import LoraportError, Problems

if TYPE_CHECKING:
    import numpy as np
    import torch

_ALGORITHM = "xxh3-128"
_CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32 at a time


@dataclass(frozen=True)
class BaseFingerprint:
    """Module path → hexadecimal hash of the module's base weight."""

    modules: Mapping[str, str]

    def require_same_base(self, other: BaseFingerprint, what: str, base: str) -> None:
        """Refuse if a module that both fingerprints know has another weight in each.

        Args:
            other: The fingerprint of the base at hand.
            what: What carries this fingerprint, for the message.
            base: What carries the other one, for the message.

        Raises:
            LoraportError: Naming every module that differs.
        """
        problems = Problems()
        for path, digest in self.modules.items():
            found = other.modules.get(path)
            if found is not None and found != digest:
                problems.add(
                    path,
                    f"base weight {digest[:12]}",
                    found[:12],
                    f"use the base that {what} was made for",
                )
        shared = self.modules.keys() & other.modules.keys()
        problems.raise_if_any(
            f"{what} belongs to another base than {base}: "
            f"{len(problems.found)} of {len(shared)} base weights differ"
        )

    def restricted_to(self, module_paths: Iterable[str]) -> BaseFingerprint:
        """Return the fingerprint of these modules only; unknown ones are left out."""
        return BaseFingerprint(
            {path: self.modules[path] for path in module_paths if path in self.modules}
        )

    def to_json(self) -> str:
        """Return the text stored in files."""
        return json.dumps({"algorithm": _ALGORITHM, "modules": dict(sorted(self.modules.items()))})

    @classmethod
    def from_json(cls, text: str) -> BaseFingerprint:
        """Read what `to_json` wrote.

        Raises:
            LoraportError: If it is something else.
        """
        try:
            document = json.loads(text)
            algorithm, modules = document["algorithm"], document["modules"]
            valid = algorithm == _ALGORITHM and all(
                isinstance(digest, str) for digest in modules.values()
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            valid = False
        if not valid:
            raise LoraportError(
                f"base fingerprint: expected {_ALGORITHM} hashes by module, got {text[:80]!r}"
            )
        return cls(modules)


def hash_weight(weight: torch.Tensor) -> str:
    """Hash one weight's shape and values; see the module's docstring.

    Args:
        weight: Any shape, any floating dtype, any device.
    """
    import torch

    flat = weight.detach().reshape(-1)
    chunks = (flat[s : s + _CHUNK_ELEMENTS] for s in range(0, flat.numel(), _CHUNK_ELEMENTS))
    arrays = (chunk.to(device="cpu", dtype=torch.float32).contiguous().numpy() for chunk in chunks)
    return hash_rows(tuple(weight.shape), arrays)


def hash_rows(shape: tuple[int, ...], rows: Iterable[np.ndarray]) -> str:
    """Hash one weight that is read piece by piece; the same as `hash_weight` of the whole.

    Args:
        shape: The weight's shape.
        rows: Its values as float32 in order, in pieces of any size.
    """
    import xxhash

    digest = xxhash.xxh3_128(repr(shape).encode())
    for piece in rows:
        digest.update(piece.data)
    return digest.hexdigest()


def fingerprint(
    module_paths: Iterable[str], weight: Callable[[str], torch.Tensor]
) -> BaseFingerprint:
    """Fingerprint the base weights of some modules.

    Args:
        module_paths: The modules that adapters touch or may touch.
        weight: Gives a module's base weight by module path.
    """
    return BaseFingerprint({path: hash_weight(weight(path)) for path in module_paths})
