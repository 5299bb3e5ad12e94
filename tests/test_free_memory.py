"""What is free: of the machine, or of the container that the process is in."""

from pathlib import Path

import pytest

from loraport.free_memory import free_memory

GB = 10**9
MEMINFO = f"MemTotal: {64 * GB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {50 * GB // 1024} kB\n"


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for path, text in {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def v2(path: str, most: object, used: int, cached: int = 0) -> dict[str, str]:
    place = f"sys/fs/cgroup/{path}"
    stat = f"anon 5\ninactive_file {cached}\nactive_file 9\n"
    texts = {"memory.max": f"{most}\n", "memory.current": f"{used}\n", "memory.stat": stat}
    return {f"{place}/{name}": text for name, text in texts.items()}


def v1(path: str, most: int, used: int, cached: int = 0) -> dict[str, str]:
    place = f"sys/fs/cgroup/memory/{path}"
    stat = f"inactive_file 3\ntotal_inactive_file {cached}\n"
    texts = {"memory.limit_in_bytes": f"{most}\n", "memory.usage_in_bytes": f"{used}\n"}
    return {f"{place}/{name}": text for name, text in (texts | {"memory.stat": stat}).items()}


@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        ("0::/\n", {}, 50),
        ("0::/\n", v2("", "max", 60 * GB), 50),
        ("0::/\n", v2("", 8 * GB, 5 * GB, 2 * GB), 5),
        ("0::/\n", v2("", 8 * GB, 9 * GB), 0),
        ("0::/\n", v2("", 100 * GB, 5 * GB), 50),
        # A limit above, and the host's path in a container.
        ("0::/a/b\n", v2("a/b", "max", GB) | v2("a", 8 * GB, 5 * GB), 3),
        ("0::/docker/1f\n", v2("", 8 * GB, 5 * GB), 3),
        ("5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n", v1("x", 8 * GB, 5 * GB, GB), 4),
        ("4:memory:/docker/1f\n", v1("", 8 * GB, 5 * GB), 3),
        ("4:memory:/\n", v1("", 9223372036854771712, 5 * GB), 50),
        ("5:cpu:/x\n", v1("x", 8 * GB, 5 * GB), 50),
        ("nonsense\n", {}, 50),
    ],
)
def test_a_containers_limit_counts(tmp_path, cgroup, files, free):
    assert free_memory(machine(tmp_path, cgroup, files)) == pytest.approx(free * GB, abs=1024)


def test_where_the_system_does_not_tell(tmp_path):
    assert free_memory(tmp_path) is None
    assert (free_memory() is None) is not Path("/proc/meminfo").exists()
