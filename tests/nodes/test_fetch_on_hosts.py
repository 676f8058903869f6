"""The model's files over three hosts in namespaces: keepers, hatches, examiners, no engines.

Each host has a ``/tmp`` of its own; the model is on host 1 alone.
"""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from e2e.node_scene import LIMIT_S, Scene, surroundings
from hosts import Host, Hosts, unavailable
from nodes.test_file_fetch import contents, make_model

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(unavailable()), reason=f"no hosts can be made: {unavailable()}"),
]

# What a server does of it, inside host 0.
SERVER = """
import asyncio, json, sys
from oserve.config.cluster import load_hosts
from oserve.engines.clock import LiveClock
from oserve.nodes.host_cluster import HostDirectory
from oserve.nodes.link_book import LinkBook
from oserve.nodes.link_measuring import LinkMeasuring
from oserve.nodes.model_fetch import ModelFetch

async def main():
    directory = HostDirectory(load_hosts(sys.argv[1]))
    await directory.start()
    clock, book = LiveClock(), LinkBook()
    up = lambda: {name: node for name, node in directory.nodes.items() if node.usable}
    async def changed():
        pass
    links = LinkMeasuring(up, book, clock, changed=changed)
    fetch = ModelFetch(
        [sys.argv[2]], up, clock, rates=book.rates, rates_known=lambda: links.idle
    )
    links.busy = lambda: fetch.active
    links.begin()
    fetch.begin()
    while any(fetch.lacks(name) != "" for name in directory.nodes):
        await asyncio.sleep(0.05)
    await fetch.close()
    await links.close()
    await directory.close(end_nodes=False)
    print(json.dumps({name: book.summary(name) for name in directory.nodes}))

asyncio.run(main())
"""


def nobody_visits(host: Host) -> bool:
    return host.processes("oserve.nodes.examiner") == []


def test_every_host_gets_the_model(tmp_path: Path) -> None:
    with Hosts(4, tmp_path) as hosts:
        source = make_model(hosts[1].tmp / "models" / "tiny", bytes(range(256)) * 40_000)
        scene = Scene(hosts, tmp_path, surroundings(), slots=1, numbers=(1, 2, 3))
        with ThreadPoolExecutor() as pool:
            list(pool.map(scene.serve_node, scene.numbers))
        scene.write_cluster()
        command = [sys.executable, "-c", SERVER, scene.cluster, "/tmp/models/tiny"]
        done = subprocess.run(
            hosts[0].words(command),
            env=scene.env,
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode() + scene.logs()
        links = json.loads(done.stdout)
        for number in (2, 3):
            models = hosts[number].tmp / "models"
            assert contents(models / "tiny") == contents(source)
            assert [item.name for item in models.iterdir()] == ["tiny"]
        assert {name: one["measured"] for name, one in links.items()} == dict.fromkeys(
            ("host1", "host2", "host3"), 2
        )
        # Nothing of the visits is left.
        for number in scene.numbers:
            scene.reach(partial(nobody_visits, hosts[number]))
            for pid in hosts[number].processes("oserve.cli", "node"):
                os.kill(pid, signal.SIGINT)
            scene.nodes[number].wait(timeout=60)
