"""What keeps a process from joining a Ray cluster, without Ray."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from oserve.core import OServeError
from oserve.nodes.ray_joining import await_raylet, knock

RAYLET = b"/ray/raylet/raylet\0--raylet_socket_name=s\0--node_id=abc\0"
# Writes what Ray writes, and says how often the watch has called.
WATCHED = """
import os, sys
from oserve.nodes.ray_joining import TokenWatch
told = []
watch = TokenWatch(lambda: told.append(1))
for line in sys.argv[1:]:
    os.write(2, line.encode() + b"\\n")
watch.close()
os.write(2, b"after\\n")
print(len(told))
"""
REFUSAL = "gcs_client.cc:210: Failed: Unauthenticated: RPC error: InvalidAuthToken: missing"


def process(proc: Path, number: int, command: bytes) -> None:
    (proc / str(number)).mkdir()
    (proc / str(number) / "cmdline").write_bytes(command)


def test_a_machine_without_a_raylet_is_told_so(tmp_path: Path) -> None:
    process(tmp_path, 1, b"/bin/bash\0ray start --node-ip-address=1\0")
    (tmp_path / "meminfo").write_text("")
    (tmp_path / "3").mkdir()  # it has just ended
    with pytest.raises(OServeError, match="has no raylet") as caught:
        await_raylet(tmp_path, limit_s=0.0)
    assert "ray start --address=HEAD:6379" in caught.value.remedy
    process(tmp_path, 2, RAYLET)
    await_raylet(tmp_path, limit_s=0.0)


def test_no_head_at_that_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        knock(*server.getsockname())
        address = server.getsockname()
    with pytest.raises(OServeError, match="no Ray head answers"):
        knock(*address)


@pytest.mark.parametrize(("lines", "calls"), [([REFUSAL] * 2, 0), ([REFUSAL] * 3, 1)])
def test_a_token_that_is_refused_is_noticed(lines: list[str], calls: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *lines],
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    assert done.stdout == b"%d\n" % calls
    assert done.stderr.count(b"InvalidAuthToken") == len(lines)
    assert done.stderr.endswith(b"after\n")
