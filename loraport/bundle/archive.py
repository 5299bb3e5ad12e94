"""One-file archives of bundles, whole or only what another bundle lacks.

An archive is a zip of stored (uncompressed) files: ``manifest.json`` first, then files that
the manifest lists. A whole archive has all of them; a delta leaves out those that the bundle it
is put onto has already, so a new adapter travels as a few megabytes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from loraport.bundle.manifest import MANIFEST_FILE, Manifest, check_files, read_manifest
from loraport.errors import LoraportError, Problems
from loraport.output import new_directory, new_file

_LARGEST_MANIFEST = 64 << 20
_COPY_BYTES = 1 << 20
# The same bytes for the same bundle, whenever it is packed.
_TIMESTAMP = (1980, 1, 1, 0, 0, 0)
_MODE = 0o644 << 16

Progress = Callable[[str], None]


def _silent(text: str) -> None:
    del text


def pack_bundle(
    bundle: Path | str,
    archive: Path | str,
    *,
    without: Path | str | None = None,
    force: bool = False,
    progress: Progress = _silent,
) -> int:
    """Write a bundle, or what it has beyond another one, as one file.

    Args:
        bundle: The bundle; its files are checked first.
        archive: The new file.
        without: A bundle whose files are left out where they are the same: gives a delta.
        force: Replace an existing archive.
        progress: Told each file.

    Returns:
        The number of files packed, the manifest included.

    Raises:
        LoraportError: If a bundle is damaged, or the archive exists or lies in a bundle.
    """
    bundle, archive = Path(bundle), Path(archive)
    without = None if without is None else Path(without)
    _require_outside(archive, bundle, without)
    manifest = read_manifest(bundle)
    check_files(manifest, bundle)
    known = read_manifest(without).files if without is not None else {}
    paths = [path for path, digest in manifest.files.items() if known.get(path) != digest]
    with (
        new_file(archive, force=force) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as target,
    ):
        for path in [MANIFEST_FILE, *paths]:
            progress(path)
            entry = zipfile.ZipInfo(path, _TIMESTAMP)
            entry.external_attr = _MODE
            entry.file_size = (bundle / path).stat().st_size
            with (bundle / path).open("rb") as source, target.open(entry, "w") as sink:
                shutil.copyfileobj(source, sink, _COPY_BYTES)
    return 1 + len(paths)


def unpack_bundle(
    archive: Path | str,
    bundle: Path | str,
    *,
    onto: Path | str | None = None,
    force: bool = False,
    progress: Progress = _silent,
) -> Manifest:
    """Turn an archive into a bundle, which appears whole and intact or not at all.

    Args:
        archive: What `pack_bundle` wrote, or anybody; it is read as untrusted.
        bundle: The new bundle's directory.
        onto: For a delta: the bundle that has the rest.
        force: Replace an existing bundle; it may be ``onto`` itself, whose files are then
            taken over rather than copied.
        progress: Told each file.

    Raises:
        LoraportError: If the archive is damaged, has anything the manifest does not list, or
            a file is missing or differs from its hash.
    """
    archive, bundle = Path(archive), Path(bundle)
    onto = None if onto is None else Path(onto)
    _require_outside(bundle, onto)
    with _opened(archive) as source:
        manifest = _read_manifest(source, archive)
        entries = _check_entries(source, manifest, archive)
        if onto is None:
            _require_all(entries, manifest, archive)
        with new_directory(bundle, force=force) as partial:
            for path in [MANIFEST_FILE, *manifest.files]:
                target = partial / path
                target.parent.mkdir(parents=True, exist_ok=True)
                progress(path)
                if path in entries:
                    with _reading(archive), source.open(path) as stream, target.open("wb") as sink:
                        shutil.copyfileobj(stream, sink, _COPY_BYTES)
                elif onto is not None and (onto / path).is_file():
                    _take(onto / path, target, moving=_same(onto, bundle))
            together = f" put onto {onto}, which may not be the bundle it was made for,"
            check_files(manifest, partial, f"archive {archive}{together if onto else ''}")
    return manifest


def is_packed_bundle(path: Path) -> bool:
    """Tell whether a path is an archive of a bundle, whole or a delta."""
    try:
        with zipfile.ZipFile(path) as archive:
            return MANIFEST_FILE in archive.namelist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError):
        return False


def _require_outside(output: Path, *bundles: Path | None) -> None:
    """Refuse an output inside a bundle that is read: the bundle would ship with it."""
    for bundle in bundles:
        if bundle is not None and bundle.resolve() in output.resolve().parents:
            raise LoraportError(
                f"{output}: expected an output outside the bundles that are read, got one inside "
                f"{bundle}; choose another output"
            )


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    with _reading(archive):
        source = zipfile.ZipFile(archive)
    with source:
        yield source


@contextlib.contextmanager
def _reading(archive: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise LoraportError(f"archive {archive}: expected an intact zip, got: {error}") from error


def _read_manifest(source: zipfile.ZipFile, archive: Path) -> Manifest:
    with _reading(archive):
        try:
            entry = source.getinfo(MANIFEST_FILE)
        except KeyError:
            raise LoraportError(
                f"archive {archive}: expected {MANIFEST_FILE} in it, got none; "
                "it was not made by loraport bundle pack"
            ) from None
        if entry.compress_type != zipfile.ZIP_STORED:
            raise LoraportError(
                f"archive {archive}: expected {MANIFEST_FILE} stored as it is, got it compressed; "
                "pack the bundle with loraport bundle pack"
            )
        if entry.file_size > _LARGEST_MANIFEST:
            raise LoraportError(
                f"archive {archive}: {MANIFEST_FILE} of {entry.file_size} bytes is absurd"
            )
        text = source.read(MANIFEST_FILE)
    return Manifest.from_json(text)


def _check_entries(source: zipfile.ZipFile, manifest: Manifest, archive: Path) -> set[str]:
    """Refuse everything that a packed bundle never has, before a byte is written."""
    problems = Problems()
    allowed = {MANIFEST_FILE, *manifest.files}
    names: set[str] = set()
    whole = archive.stat().st_size
    for entry in source.infolist():
        name = entry.filename
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name:
            problems.add(name, "a path inside the bundle", "one that leaves it")
        elif name not in allowed:
            problems.add(name, "a file the manifest lists", "another one")
        elif name in names:
            problems.add(name, "each file once", "it twice")
        elif entry.compress_type != zipfile.ZIP_STORED or entry.file_size > whole:
            got = f"{entry.file_size} bytes, packed as {entry.compress_size}"
            problems.add(name, "a stored file no larger than the archive", got)
        elif (entry.external_attr >> 16) & 0o170000 not in (0, 0o100000):
            problems.add(name, "a plain file", "a link or a device")
        names.add(name)
    problems.raise_if_any(f"archive {archive} is refused")
    return names


def _require_all(entries: set[str], manifest: Manifest, archive: Path) -> None:
    problems = Problems()
    for path in manifest.files.keys() - entries:
        problems.add(path, "the file the manifest lists", "none", "a delta needs --onto BUNDLE")
    problems.raise_if_any(f"archive {archive} is not a whole bundle")


def _same(onto: Path, bundle: Path) -> bool:
    return bundle.exists() and onto.samefile(bundle)


def _take(source: Path, target: Path, *, moving: bool) -> None:
    """Take over a file of the old bundle: linked if that one goes away, else copied.

    A lasting second name is no choice: onnx and onnx-ir refuse data files with several.
    """
    if moving:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
