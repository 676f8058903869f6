"""Main memory, as the kernel tells of it in its various ways."""

from pathlib import Path

import pytest

from oserve.engines.main_memory import available_memory_bytes, total_memory_bytes

GIB = 1 << 30
NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def machine(root: Path, group: str = "") -> Path:
    proc = root / "proc" / "self"
    proc.mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    (proc / "cgroup").write_text(group)
    return root


def bounded(root: Path, path: str, version: int, bound: object, used: int, files: int = 0) -> None:
    folder = root / "sys/fs/cgroup" / ("memory" if version == 1 else "") / path
    folder.mkdir(parents=True, exist_ok=True)
    bound_name, used_name, files_name = NAMES[version]
    (folder / bound_name).write_text(f"{bound}\n")
    (folder / used_name).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{files_name} {files}\nactive_file 9\n")


def test_without_groups_the_machine_counts(tmp_path: Path) -> None:
    root = machine(tmp_path)
    assert total_memory_bytes(root) == 16 * GIB
    assert available_memory_bytes(root) == 8 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_the_least_bound_around_counts(tmp_path: Path, version: int) -> None:
    name = {1: "7:memory:/outer/inner\n3:cpu:/x\n", 2: "0::/outer/inner\n"}[version]
    root = machine(tmp_path, name)
    bounded(root, "outer/inner", version, 6 * GIB, used=3 * GIB, files=GIB)
    assert total_memory_bytes(root) == 6 * GIB
    # File pages that are not in use are free.
    assert available_memory_bytes(root) == 4 * GIB
    bounded(root, "outer", version, 5 * GIB, used=4 * GIB)
    assert total_memory_bytes(root) == 5 * GIB
    assert available_memory_bytes(root) == GIB
    # More in use than allowed, as happens for a moment.
    bounded(root, "", version, 2 * GIB, used=3 * GIB)
    assert available_memory_bytes(root) == 0


def test_no_bound_is_none(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n4:memory:/a\n")
    bounded(root, "", 2, "max", used=GIB)
    bounded(root, "a", 1, 9223372036854771712, used=GIB)
    assert total_memory_bytes(root) == 16 * GIB
    assert available_memory_bytes(root) == 8 * GIB


def test_in_a_container_the_top_is_what_can_be_seen(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/system.slice/docker-1.scope\n")
    bounded(root, "", 2, 3 * GIB, used=GIB)
    assert available_memory_bytes(root) == 2 * GIB
