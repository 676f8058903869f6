"""``oserve serve`` as a process of its own, for benchmarks of faults."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_START_LIMIT_S = 240.0
_END_LIMIT_S = 60.0


@contextlib.contextmanager
def served(folder: Path, name: str, plan: str, *words: str) -> Iterator[str]:
    """Serve the tiny model of a folder by a plan, until the context ends: the server's URL.

    ``name`` tells plan, log and state of this server in the folder; ``words`` are more arguments.
    Ends the program with the server's log if it is not ready after four minutes.
    """
    file = folder / f"{name}.yaml"
    file.write_text(plan)
    log = folder / f"{name}.log"
    command = [
        *(sys.executable, "-m", "oserve.cli", "serve", str(folder / "tiny"), "--plan", str(file)),
        *("--state-dir", str(folder / f"state-{name}"), "--port", "0", *words),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        deadline_s = time.monotonic() + _START_LIMIT_S
        while "Ready on" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(log.read_text())
            time.sleep(0.1)
        line = next(line for line in log.read_text().splitlines() if line.startswith("Ready on"))
        yield line.split()[2]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
