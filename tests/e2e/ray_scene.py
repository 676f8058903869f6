"""The scene of ``node_scene`` with the nodes of a real Ray cluster, whose head is host 0."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from e2e.node_scene import NODES, Scene, surroundings
from hosts import Hosts
from raylets import Raylets, running

KEEPER = "oserve.engines.keeper"
HELPER = "oserve.nodes.ray_helper"
AGENT = "ray::NodeAgent"
RAYLET = "raylet/raylet"
GCS = "gcs_server"

MORE = ("--set", "cluster.devices=cpu", "--set", "cluster.node_state_dir=/tmp/nodes")


@dataclass
class RayScene(Scene):
    """A scene whose nodes Ray tells of."""

    raylets: Raylets | None = None
    slots: int = 3

    def serve(self, *more: str) -> None:
        """See ``Scene.serve``."""
        super().serve(*self.words, *more)

    @property
    def words(self) -> tuple[str, ...]:
        """What every server here is told."""
        return (*MORE, "--cpu-slots", str(self.slots))

    @property
    def ray(self) -> Raylets:
        """Ray on the hosts."""
        assert self.raylets is not None
        return self.raylets

    def keepers(self) -> list[int]:
        """The keepers of all nodes."""
        return [pid for number in NODES for pid in self.hosts[number].processes(KEEPER)]


@contextmanager
def ray_scene(folder: Path, *, slots: int = 3) -> Iterator[RayScene]:
    """Three hosts with Ray, which has been started on all of them; no server yet.

    ``slots``: CPU slots of a node.
    """
    offered = {number: {"oserve_slot": slots} for number in NODES}
    with Hosts(3, folder) as hosts, running(hosts, folder, offered) as raylets:
        env = surroundings() | raylets.env
        scene = RayScene(hosts, folder, env, raylets=raylets, slots=slots)
        scene.cluster = f"ray:{raylets.address}"
        scene.reach(lambda: all(raylets.joined(number) for number in (0, *NODES)))
        yield scene
