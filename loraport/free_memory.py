"""The host's memory that is free for this process: of the machine, and of its container.

A container's limit (Docker's ``--memory``, Kubernetes, Slurm, systemd) is that of a control group;
``/proc/meminfo`` tells the whole machine's memory there, too. Source: Linux's documentation of
cgroup v2 (``memory.max``, ``memory.current``) and v1 (``memory.limit_in_bytes``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Limit, use, and what of the use is cached files that are given up first; v2's and v1's names.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that are free without swapping; ``None`` where the system does not tell.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    return min([free, *_rooms_in_groups(root)])


def _rooms_in_groups(root: Path) -> Iterator[int]:
    """Yield what is left below the limit of each control group that this process is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        place = "sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup"
        top = root / place
        own = top / path.lstrip("/")
        # Without a name space of its own a container sees the host's path, and its group on top.
        for group in (own, *own.parents):
            room = _room(group, *(_V1 if controllers else _V2))
            if room is not None:
                yield room
            if group == top:
                break


def _room(group: Path, limit: str, use: str, cached: str) -> int | None:
    try:
        most, used = (int((group / name).read_text()) for name in (limit, use))
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, most - used + int(facts.get(cached, 0)))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
