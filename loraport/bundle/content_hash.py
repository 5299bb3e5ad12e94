"""What a file's content hashes to, by two algorithms.

sha256 tells a file from every other; the manifest lists it for all. xxh3-128 takes a tenth of the
time and tells a damaged file, though not one that was made to have it: what a running model takes
up is compared with that.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

SHA256 = "sha256"
XXH3 = "xxh3-128"


class Digest(Protocol):
    """A hash that is being taken, as ``hashlib`` and ``xxhash`` have it."""

    def update(self, data: memoryview, /) -> None:
        """Take in the next bytes."""

    def hexdigest(self) -> str:
        """Return the hash of all bytes so far."""


@dataclass(frozen=True)
class ContentHash:
    """A hash in hexadecimal digits, and by which algorithm."""

    algorithm: str
    digits: str

    def __str__(self) -> str:
        return f"{self.algorithm} {self.digits[:12]}"

    def digest(self) -> Digest:
        """Return a new digest of the same algorithm."""
        if self.algorithm == SHA256:
            return hashlib.sha256()
        import xxhash

        return xxhash.xxh3_128()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_xxh3(path: Path) -> str:
    """Return the xxh3-128 of a file's content."""
    import xxhash

    with path.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
