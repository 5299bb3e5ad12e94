"""One process per output."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraport.errors import LoraportError
from loraport.output import require_name


@contextmanager
def only_process(path: Path) -> Iterator[None]:
    """Hold a lock beside ``path`` that ends with the process, however that ends.

    Args:
        path: The output; the lock is a file ``.NAME.lock`` beside it.

    Raises:
        LoraportError: If another process holds it, or the output has no name.
    """
    require_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{path.name}.lock")
    handle = _locked(name)
    try:
        os.truncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        if os.name != "nt":  # where an open file cannot be removed
            name.unlink(missing_ok=True)
        os.close(handle)


def _locked(name: Path) -> int:
    while True:
        handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
        except OSError:
            holder = os.read(handle, 20).decode(errors="replace") or "another one"
            os.close(handle)
            raise LoraportError(
                f"{name}: expected no other process at work on this output, got process {holder}; "
                "wait for it to end, or choose another output"
            ) from None
        # The holder before removes the file it locked: that one is then no lock any more.
        if _same(handle, name):
            return handle
        os.close(handle)


def _same(handle: int, name: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), name.stat())
    except FileNotFoundError:
        return False


def _lock(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        # Far behind the process number, which others may want to read.
        os.lseek(handle, 1024, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
