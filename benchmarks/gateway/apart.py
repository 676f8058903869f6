"""What gateway and keeper cost as processes of their own, on an idle server.

    python benchmarks/gateway/apart.py [--seconds 20]

Prints, for each process of ``oserve serve`` before a server that is not there: CPU time to start,
share of a core while idle, and memory of its own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run import cpu_s, free_port

from oserve.engines.registry import read_registry

_LIMIT_S = 120.0
_SETTLE_S = 5.0


def own_mib(pid: int) -> float:
    """Anonymous memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plan = folder / "plan.yaml"
        plan.write_text(f"replicas: [{{id: b, attach: {{url: 'http://127.0.0.1:{free_port()}'}}}}]")
        command = [sys.executable, "-m", "oserve.cli", "serve", "--plan", str(plan)]
        command += ["--served-model-name", "x", "--port", "0", "--state-dir", str(folder)]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            pids = {"server": server.pid, **held(folder, server)}
            time.sleep(_SETTLE_S)
            before = {name: cpu_s([pid]) for name, pid in pids.items()}
            time.sleep(wanted.seconds)
            print(f"{'':10}{'start, CPU s':>14}{'idle, of a core':>18}{'own MiB':>10}")
            for name, pid in pids.items():
                share = (cpu_s([pid]) - before[name]) / wanted.seconds
                print(f"{name:10}{before[name]:>14.2f}{share:>18.2%}{own_mib(pid):>10.0f}")
            print(f"load average {os.getloadavg()[0]:.1f}")
        finally:
            server.terminate()
            server.wait()


def held(folder: Path, server: "subprocess.Popen[bytes]") -> dict[str, int]:
    """Keeper and gateway, once they are there."""
    deadline_s = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline_s and server.poll() is None:
        registry = read_registry(folder / "keeper.json")
        if registry is not None and registry.held and registry.held[0].pid:
            return {"keeper": registry.pid, "gateway": registry.held[0].pid}
        time.sleep(0.1)
    sys.exit("it did not come up")


if __name__ == "__main__":
    main()
