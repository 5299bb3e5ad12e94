"""``manifest.json``: what is in a bundle, and how to tell that it is intact."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from loraport.bundle.content_hash import SHA256, XXH3, ContentHash, file_sha256, file_xxh3
from loraport.bundle.seal import require_seal, sealed
from loraport.bundle.slots import SlotTable
from loraport.errors import LoraportError, Problems, first_names
from loraport.fingerprint import BaseFingerprint
from loraport.output import new_file

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 1
MODEL_FILE = "model.onnx"
REQUIRED_MODEL_FILE = "model.required.onnx"


@dataclass(frozen=True)
class BundledAdapter:
    """One adapter of a bundle.

    Attributes:
        ranks: Slot name → rank of its tensors; slots it leaves alone are absent.
        scalings: Module path → the scaling that was folded into ``B``.
        source_sha256: Content hash of the adapter it was packed from.
        file: ``.onnx_adapter`` path inside the bundle.
        tensors: ``.safetensors`` path inside the bundle, the same tensors.
    """

    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    source_sha256: str
    file: str
    tensors: str


@dataclass(frozen=True)
class GoldenCase:
    """Inputs and the outputs they must give, for runners to check themselves against.

    Attributes:
        adapters: Adapter name → strength; empty for the base.
        file: ``.safetensors`` inside the bundle: ``input.NAME`` and ``output.NAME`` tensors.
    """

    adapters: Mapping[str, float]
    file: str


@dataclass(frozen=True)
class Manifest:
    """A bundle's table of contents.

    Attributes:
        base_name: What the base calls itself.
        fingerprint: Content hashes of the base weights that slots sit on.
        precision: How the base's weights are stored, e.g. ``"fp32"`` or ``"int4"``.
        slots: The slot table.
        unslotted: Module or parameter path → why it has no slot; name of the input for a gain
            that was asked for → why a slot has none.
        computed: Modules whose weights the exporter computed, maybe with a normalization folded in;
            adapters of the module as it was do not fit there.
        adapters: By name.
        golden: By case name.
        tolerance: Largest allowed absolute difference of an output from its golden value.
        tolerances: Runtime (``"wasm"``, ``"webgpu"``) → its own, where it needs another.
        files: Path inside the bundle → sha256 of its content.
        xxh3: Adapters' ``tensors`` → xxh3-128 of the content, which takes a tenth of the time.
        made_by: Tool and version.
        long_rotations_after: Tokens that a text may have before all of them are rotated by other
            factors, so that cached keys no longer hold (longrope); ``None`` where there are none.
    """

    base_name: str
    fingerprint: BaseFingerprint
    precision: str
    slots: SlotTable
    unslotted: Mapping[str, str]
    adapters: Mapping[str, BundledAdapter] = field(default_factory=dict)
    golden: Mapping[str, GoldenCase] = field(default_factory=dict)
    tolerance: float = 0.0
    tolerances: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    xxh3: Mapping[str, str] = field(default_factory=dict)
    made_by: str = ""
    computed: tuple[str, ...] = ()
    long_rotations_after: int | None = None

    def with_files(self, directory: Path, paths: list[str]) -> Manifest:
        """Return the manifest with these files' hashes taken anew."""
        hashes = {path: file_sha256(directory / path) for path in paths}
        tensors = {entry.tensors for entry in self.adapters.values()}.intersection(paths)
        quick = {path: file_xxh3(directory / path) for path in tensors}
        return replace(
            self,
            files=dict(sorted({**self.files, **hashes}.items())),
            xxh3=dict(sorted({**self.xxh3, **quick}.items())),
        )

    def quickest_hash(self, path: str) -> ContentHash:
        """Return what a file's content must hash to, by the quickest algorithm there is for it."""
        quick = self.xxh3.get(path)
        return ContentHash(SHA256, self.files[path]) if quick is None else ContentHash(XXH3, quick)

    def without(self, names: Iterable[str]) -> Manifest:
        """Return the manifest without these adapters, their files and their golden cases."""
        gone = set(names)
        adapters = {name: entry for name, entry in self.adapters.items() if name not in gone}
        golden = {
            name: case for name, case in self.golden.items() if not gone & case.adapters.keys()
        }
        dropped = {self.golden[name].file for name in self.golden.keys() - golden.keys()}
        for name in self.adapters.keys() - adapters.keys():
            dropped |= {self.adapters[name].file, self.adapters[name].tensors}
        files = {path: digest for path, digest in self.files.items() if path not in dropped}
        xxh3 = {path: digest for path, digest in self.xxh3.items() if path not in dropped}
        return replace(self, adapters=adapters, golden=golden, files=files, xxh3=xxh3)

    def require_adapter(self, name: str) -> BundledAdapter:
        """Return an adapter's entry.

        Raises:
            LoraportError: If the bundle has none of this name.
        """
        try:
            return self.adapters[name]
        except KeyError:
            raise LoraportError(
                f"adapter {name!r}: expected one of the bundle's ({first_names(self.adapters)}); "
                "add it with loraport add"
            ) from None

    def to_json(self) -> str:
        """Return the file's text."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "made_by": self.made_by,
            "base": {"name": self.base_name, "fingerprint": json.loads(self.fingerprint.to_json())},
            "precision": self.precision,
            "model": MODEL_FILE,
            "model_required": REQUIRED_MODEL_FILE,
            **self.slots.to_json(),
            "unslotted": dict(self.unslotted),
            "computed": list(self.computed),
            "adapters": {name: vars(adapter) for name, adapter in self.adapters.items()},
            "golden": {name: vars(case) for name, case in self.golden.items()},
            "tolerance": self.tolerance,
            "tolerances": dict(self.tolerances),
            "files": dict(self.files),
            "xxh3_128": dict(self.xxh3),
        }
        if self.long_rotations_after is not None:
            document["long_rotations_after"] = self.long_rotations_after
        return sealed(document, MANIFEST_FILE)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read the file's text.

        Raises:
            LoraportError: If it is damaged, no manifest of this version, or a path leaves the
                bundle.
        """
        require_seal(text.encode() if isinstance(text, str) else text, MANIFEST_FILE)
        try:
            document = json.loads(text)
            version = document["schema_version"]
            if version != SCHEMA_VERSION:
                raise LoraportError(
                    f"{MANIFEST_FILE}: expected schema version {SCHEMA_VERSION}, got {version!r}; "
                    "use the loraport that wrote the bundle, or a newer one"
                )
            manifest = cls._from_document(document)
            manifest._refuse_outside_paths()
        except (
            ArithmeticError,  # int() of an infinity
            AttributeError,
            KeyError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise LoraportError(f"{MANIFEST_FILE}: expected a manifest, got: {error!r}") from error
        return manifest

    @classmethod
    def _from_document(cls, document: Mapping[str, Any]) -> Manifest:
        base = document["base"]
        border = document.get("long_rotations_after")
        return cls(
            base_name=str(base["name"]),
            fingerprint=BaseFingerprint.from_json(json.dumps(base["fingerprint"])),
            precision=str(document["precision"]),
            slots=SlotTable.from_json(document),
            unslotted=_texts(document["unslotted"]),
            adapters={
                name: BundledAdapter(**entry) for name, entry in document["adapters"].items()
            },
            golden={name: GoldenCase(**entry) for name, entry in document["golden"].items()},
            tolerance=float(document["tolerance"]),
            tolerances={
                runtime: float(bound) for runtime, bound in document.get("tolerances", {}).items()
            },
            files=_texts(document["files"]),
            xxh3=_texts(document.get("xxh3_128", {})),
            made_by=str(document["made_by"]),
            computed=tuple(map(str, document.get("computed", ()))),
            long_rotations_after=None if border is None else operator.index(border),
        )

    def _refuse_outside_paths(self) -> None:
        problems = Problems()
        paths = [*self.files, *(case.file for case in self.golden.values())]
        paths += [path for entry in self.adapters.values() for path in (entry.file, entry.tensors)]
        for path in paths:
            parts = PurePosixPath(path)
            if parts.is_absolute() or ".." in parts.parts or "\\" in path or ":" in path:
                problems.add(path, "a path inside the bundle", "one that leaves it")
        problems.raise_if_any(f"{MANIFEST_FILE} names files outside the bundle")


def _texts(document: Mapping[str, Any]) -> dict[str, str]:
    if not all(isinstance(value, str) for value in document.values()):
        raise TypeError("expected texts")
    return dict(document)


def read_manifest(directory: Path) -> Manifest:
    """Read a bundle's manifest.

    Raises:
        LoraportError: If ``directory`` is no bundle.
    """
    try:
        text = (directory / MANIFEST_FILE).read_bytes()
    except OSError as error:
        remedy = "; 'loraport bundle unpack' makes one of a packed bundle"
        raise LoraportError(
            f"bundle {directory}: expected a directory with {MANIFEST_FILE}, "
            f"got: {error.strerror}{remedy if directory.is_file() else ''}"
        ) from error
    return Manifest.from_json(text)


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write a bundle's manifest; it replaces the old one in one step."""
    with new_file(directory / MANIFEST_FILE, force=True) as partial:
        partial.write_text(manifest.to_json())


def check_files(manifest: Manifest, directory: Path, subject: str | None = None) -> None:
    """Compare every file with its hash.

    Args:
        manifest: What lists them.
        directory: Where they are.
        subject: What they are to the user, where that is another than the bundle there.

    Raises:
        LoraportError: Naming every file that is missing or differs.
    """
    problems = Problems()
    for path, expected in manifest.files.items():
        if not (directory / path).is_file():
            problems.add(path, "the file the manifest lists", "no such file")
            continue
        got = file_sha256(directory / path)
        if got != expected:
            problems.add(path, f"sha256 {expected[:12]}", got[:12], "copy the bundle again")
    problems.raise_if_any(f"{subject or f'bundle {directory}'} is not intact")
