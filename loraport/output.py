"""Outputs that appear whole or not at all.

Everything is written under a temporary name beside its destination and renamed
when complete, so a killed or failed command never leaves something half-written
under the final name. Temporary names carry the writer's process id; those of
dead processes are swept away by the next writer of the same output.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from loraport.errors import LoraportError

# Some writers create files that only their owner may read; outputs get the usual mode.
_UMASK = os.umask(0o022)
os.umask(_UMASK)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PARTIAL = re.compile(r"^\.(?P<name>.+)\.partial-(?P<pid>\d+)$")


def require_name(path: Path) -> None:
    """Refuse an output with nothing to call it by, or below a file: there is no place to write.

    Raises:
        LoraportError: If it is the folder one is in, one above that, or a whole disk, or what it
            is to lie in is no directory.
    """
    if path.name in ("", ".."):
        raise LoraportError(
            f"output {str(path)!r}: expected the name of something new, got a folder that is in "
            "use; name one inside it, such as adapter"
        )
    place = next(above for above in path.absolute().parents if os.path.lexists(above))
    if not place.is_dir():
        raise LoraportError(
            f"output {path}: expected a directory to write it in, got {place}, which is a file; "
            "choose another output"
        )


def refuse_existing(path: Path, *, force: bool, inputs: Iterable[Path | str | None] = ()) -> None:
    """Refuse to overwrite ``path`` unless ``force``, and to overwrite what is read in any case.

    Args:
        path: The output.
        force: Whether it may be replaced, as a whole.
        inputs: What is read for it; only those that are files or directories here matter.

    Raises:
        LoraportError: If ``path`` has no name, is a device or pipe, exists and ``force`` is
            false, is or holds an input, or is a file of one.
    """
    require_name(path)
    # Renamed over, a device would be gone for every program of the machine.
    special = path.exists() and not path.is_file() and not path.is_dir()
    if special or path.absolute().parent == Path("/dev"):
        raise LoraportError(
            f"{path}: expected a file or directory to write, got a device or pipe, which cannot be "
            "replaced; choose another output"
        )
    if path.is_symlink() and not force:
        raise LoraportError(
            f"{path} is a link to {os.path.realpath(path)}; name that itself, choose another "
            "output, or pass --force, which replaces the link and keeps what it leads to"
        )
    if os.path.lexists(path) and not force:
        raise LoraportError(f"{path} already exists; choose another output or pass --force")
    for given in inputs:
        found = None if given is None else Path(given).expanduser()
        if found is None or not found.exists():
            continue
        if path.resolve() in (found.resolve(), *found.resolve().parents):
            raise LoraportError(
                f"{path}: expected an output that is no input and holds none, for it is replaced "
                f"as a whole, got one with {given}; choose another output"
            )
        if path.is_file() and found.resolve() in path.resolve().parents:
            raise LoraportError(
                f"{path}: expected an output that replaces no file of an input, got one of "
                f"{given}; choose another output"
            )


def refuse_other_kind(path: Path, *, directory: bool) -> None:
    """Refuse an output that is a file where a directory is to be written, or the reverse.

    Not even ``--force`` replaces one by the other, so long work asks before it begins.

    Args:
        path: The output.
        directory: Whether a directory is to be written.

    Raises:
        LoraportError: If the other kind is there.
    """
    if path.exists() and path.is_dir() is not directory:
        there, wanted = ("file", "directory") if directory else ("directory", "file")
        raise LoraportError(f"{path} is a {there}; a {wanted} is to be written there")


@contextlib.contextmanager
def new_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` when the block succeeds.

    Raises:
        LoraportError: If ``path`` exists and ``force`` is false.
        OSError: If the disk is full; it names a file, ``path`` where the system names none.
    """
    refuse_existing(path, force=force)
    refuse_other_kind(path, directory=False)
    partial = _partial_name(path)
    try:
        with naming(path):
            yield partial
        _finish(partial)
        # Looked at again: another process may have written it meanwhile.
        refuse_existing(path, force=force)
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``path`` when the block succeeds.

    With ``force`` an existing directory is replaced as a whole; it is removed
    only after its successor stands under the final name.

    Raises:
        LoraportError: If ``path`` exists and ``force`` is false, or is not a directory.
        OSError: If the disk is full; it names a file, ``path`` where the system names none.
    """
    refuse_existing(path, force=force)
    refuse_other_kind(path, directory=True)
    partial = _partial_name(path)
    partial.mkdir(parents=True)
    try:
        with naming(path):
            yield partial
        for entry in partial.rglob("*"):
            if entry.is_file():
                _finish(entry)
        refuse_existing(path, force=force)
        if os.path.lexists(path):
            replaced = path.with_name(f".{path.name}.replaced.partial-{os.getpid()}")
            path.rename(replaced)
            try:
                partial.rename(path)
            except OSError:
                replaced.rename(path)
                raise
            if replaced.is_symlink():
                replaced.unlink()
            else:
                shutil.rmtree(replaced, ignore_errors=True)
        else:
            partial.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the output in the error of a full disk, which a write to an open file does not.

    Raises:
        OSError: If the disk is full; it names a file, ``path`` where the system names none.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def cached_directory(path: Path, fill: Callable[[Path], None]) -> Path:
    """Return a directory that is filled the first time it is wanted.

    Of several processes that want it at once each may fill one of its own; the first to be ready
    keeps it, and the others take that.

    Args:
        path: The directory.
        fill: Writes its content into another directory, which becomes this one.

    Raises:
        LoraportError: If there is a file at ``path``.
    """
    if not path.is_dir():
        try:
            with new_directory(path) as partial:
                fill(partial)
        except (LoraportError, OSError):
            if not path.is_dir():
                raise
    return path


def _partial_name(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _sweep(path: Path) -> None:
    """Remove what killed writers of ``path`` left behind."""
    for entry in path.parent.iterdir():
        match = _PARTIAL.match(entry.name)
        if match is None or match["name"] not in (path.name, f"{path.name}.replaced"):
            continue
        if _alive(int(match["pid"])):
            continue
        if match["name"] != path.name and not path.exists():
            # Killed between the two renames: the old output is the only one there is.
            entry.rename(path)
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _finish(file: Path) -> None:
    """Give a complete file the usual mode and flush it to disk.

    A file that has another name elsewhere belongs to somebody else too and stays as it is.
    """
    if file.stat().st_nlink > 1:
        return
    if not file.is_symlink():
        file.chmod(0o666 & ~_UMASK)
    _sync(file)


def _sync(path: Path) -> None:
    """Flush a file or directory to disk, so that the rename never outruns the data."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
