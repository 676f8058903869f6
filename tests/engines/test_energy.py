"""The meter of a server: fake NVML, a fake powercap tree, and the model."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oserve.core import (
    Device,
    Endpoint,
    EngineWork,
    Observation,
    ReplicaPhase,
    ReplicaShape,
    ReplicaSpec,
    ReplicaState,
)
from oserve.engines.energy import DeviceCounter, EnergyMeter, in_thread
from oserve.engines.nvml import NvmlCounter
from oserve.engines.rapl import RaplCounter
from oserve.perf import TokenCosts, token_costs


class FakeNvml:
    """The functions of pynvml that are used. ``boards``: mJ, or mW of boards without a counter."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.energy_mj: dict[int, int] = {}
        self.power_mw: dict[int, int] = {}
        self.driver = True
        self.initialised = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")
        self.initialised += 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if not self.driver or index not in self.energy_mj.keys() | self.power_mw.keys():
            raise self.NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, index: int) -> int:  # noqa: N802
        if index not in self.energy_mj:
            raise self.NVMLError("Not Supported")
        return self.energy_mj[index]

    def nvmlDeviceGetPowerUsage(self, index: int) -> int:  # noqa: N802
        if index not in self.power_mw:
            raise self.NVMLError("Not Supported")
        return self.power_mw[index]


@pytest.fixture
def nvml() -> FakeNvml:
    return FakeNvml()


def test_nvml_counts_each_board_since_the_last_reading(nvml: FakeNvml) -> None:
    nvml.energy_mj = {0: 5_000_000, 1: 9_000_000}
    counter = NvmlCounter(["gpu:0", "gpu:1"], load=lambda: nvml)
    assert counter.drawn(0.0) == {}
    nvml.energy_mj = {0: 5_600_000, 1: 10_000_000}
    assert counter.drawn(5.0) == {"gpu:0": 600.0, "gpu:1": 1000.0}
    assert nvml.initialised == 1


def test_a_board_without_a_counter_is_integrated(nvml: FakeNvml) -> None:
    nvml.power_mw = {0: 100_000}
    counter = NvmlCounter(["gpu:0"], load=lambda: nvml)
    assert counter.drawn(0.0) == {}
    nvml.power_mw = {0: 300_000}
    assert counter.drawn(5.0) == {"gpu:0": 1000.0}


@pytest.mark.parametrize("value", [1_000, 10**15])
def test_a_counter_that_jumps_counts_from_there_on(nvml: FakeNvml, value: int) -> None:
    """As after the driver was loaded again."""
    nvml.energy_mj = {0: 5_000_000_000}
    counter = NvmlCounter(["gpu:0"], load=lambda: nvml)
    counter.drawn(0.0)
    nvml.energy_mj = {0: value}
    assert counter.drawn(5.0) == {}
    nvml.energy_mj = {0: value + 2_000_000}
    assert counter.drawn(10.0) == {"gpu:0": 2000.0}


def test_a_board_that_vanishes_leaves_the_others(nvml: FakeNvml) -> None:
    nvml.energy_mj = {0: 0, 1: 0}
    counter = NvmlCounter(["gpu:0", "gpu:1"], load=lambda: nvml)
    counter.drawn(0.0)
    nvml.energy_mj = {0: 1000}
    assert counter.drawn(5.0) == {"gpu:0": 1.0}
    # It is back: what it drew meanwhile was counted by the model.
    nvml.energy_mj = {0: 2000, 1: 9000}
    assert counter.drawn(10.0) == {"gpu:0": 1.0}
    nvml.energy_mj = {0: 3000, 1: 10_000}
    assert counter.drawn(15.0) == {"gpu:0": 1.0, "gpu:1": 1.0}
    nvml.driver = False
    assert counter.drawn(20.0) == {}
    nvml.driver = True
    assert counter.drawn(25.0) == {}
    nvml.energy_mj = {0: 4000, 1: 11_000}
    assert counter.drawn(30.0) == {"gpu:0": 1.0, "gpu:1": 1.0}


def test_no_package_no_driver_and_strange_faults_raise_nothing(nvml: FakeNvml) -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'pynvml'")

    assert NvmlCounter(["gpu:0"], load=missing).drawn(0.0) == {}
    nvml.driver = False
    assert NvmlCounter(["gpu:0"], load=lambda: nvml).drawn(0.0) == {}
    broken = SimpleNamespace(nvmlInit=lambda: None, NVMLError=FakeNvml.NVMLError)
    assert NvmlCounter(["gpu:0"], load=lambda: broken).drawn(0.0) == {}


class Powercap:
    """A powercap tree with its usual other domains."""

    RANGE_UJ = 262_143_328_850

    def __init__(self, root: Path, packages: int = 2) -> None:
        self.root = root
        for package in range(packages):
            self.zone(f"intel-rapl:{package}", f"package-{package}", 1_000_000)
            self.zone(f"intel-rapl:{package}:0", "core", 7)
        self.zone("intel-rapl:9", "psys", 5)
        self.zone("intel-rapl-mmio:0", "package-0", 5)

    def zone(self, folder: str, name: str, energy_uj: int) -> None:
        (self.root / folder).mkdir(exist_ok=True)
        (self.root / folder / "name").write_text(f"{name}\n")
        (self.root / folder / "max_energy_range_uj").write_text(f"{self.RANGE_UJ}\n")
        self.set(folder, energy_uj)

    def set(self, folder: str, energy_uj: int) -> None:
        (self.root / folder / "energy_uj").write_text(f"{energy_uj}\n")


def test_rapl_adds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    tree = Powercap(tmp_path)
    counter = RaplCounter(["cpu:0", "cpu:1", "cpu:2", "cpu:3"], root=tmp_path)
    assert counter.drawn(0.0) == {}
    for folder in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "intel-rapl:9"):
        tree.set(folder, 301_000_000)
    tree.set("intel-rapl-mmio:0", 301_000_000)
    assert counter.drawn(5.0) == dict.fromkeys(["cpu:0", "cpu:1", "cpu:2", "cpu:3"], 150.0)


def test_rapl_wraps_and_starts_anew(tmp_path: Path) -> None:
    tree = Powercap(tmp_path, packages=1)
    tree.set("intel-rapl:0", Powercap.RANGE_UJ - 100_000_000)
    counter = RaplCounter(["cpu:0"], root=tmp_path)
    counter.drawn(0.0)
    tree.set("intel-rapl:0", 400_000_000)
    assert counter.drawn(5.0) == {"cpu:0": 500.0}
    # A counter that starts anew, as after a suspension, is no wrap: so much was not drawn in 5 s.
    tree.set("intel-rapl:0", 100_000_000)
    assert counter.drawn(10.0) == {}
    tree.set("intel-rapl:0", 200_000_000)
    assert counter.drawn(15.0) == {"cpu:0": 100.0}


@pytest.mark.parametrize("fault", ["empty", "words", "package gone", "tree gone"])
def test_rapl_files_that_cannot_be_read_give_nothing(tmp_path: Path, fault: str) -> None:
    root = tmp_path / "powercap"
    root.mkdir()
    tree = Powercap(root)
    counter = RaplCounter(["cpu:0"], root=root)
    counter.drawn(0.0)
    if fault == "tree gone":
        root.rename(tmp_path / "away")
    elif fault == "package gone":
        (root / "intel-rapl:1").rename(tmp_path / "away")
    else:
        (root / "intel-rapl:0" / "energy_uj").write_text("" if fault == "empty" else "many\n")
    assert counter.drawn(5.0) == {}
    assert RaplCounter(["cpu:0"], root=tmp_path / "none").drawn(0.0) == {}
    if fault in {"empty", "words"}:
        tree.set("intel-rapl:0", 2_000_000)
        assert counter.drawn(10.0) == {}
        tree.set("intel-rapl:0", 3_000_000)
        assert counter.drawn(15.0) == {"cpu:0": 1.0}


def test_rapl_without_permission_gives_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files belong to root; the tests may run as root, who reads everything."""
    Powercap(tmp_path)
    reads = Path.read_text

    def refused(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, os.strerror(13), str(path))
        return reads(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refused)
    assert RaplCounter(["cpu:0"], root=tmp_path).drawn(0.0) == {}


GPUS = tuple(Device(id=f"gpu:{index}", kind="H100") for index in range(4))
SPEC = ReplicaSpec(id="r0", shape=ReplicaShape(tensor_parallel_size=2), devices=("gpu:0", "gpu:1"))


def seen(
    now_s: float, work: EngineWork | None = None, *phases: ReplicaPhase, devices: Any = GPUS
) -> Observation:
    states = tuple(
        ReplicaState(
            spec=SPEC, phase=phase, endpoint=Endpoint(url="http://r0"), since_s=0.0, work=work
        )
        for phase in phases
    )
    return Observation(now_s=now_s, devices=devices, replicas=states)


def meter(*counters: DeviceCounter, run: Callable[[Callable[[], None]], None]) -> EnergyMeter:
    return EnergyMeter(GPUS, token_costs, counters=counters, run=run)


def at_once(work: Callable[[], None]) -> None:
    work()


class Counted:
    """A counter of fixed joules by device and reading."""

    source = "nvml"

    def __init__(self, **joules: float) -> None:
        self.joules = {name.replace("_", ":"): value for name, value in joules.items()}

    def drawn(self, now_s: float) -> dict[str, float]:
        del now_s
        return self.joules


def test_without_counters_the_model_counts_and_says_so() -> None:
    it = meter(run=at_once)
    assert it.observe(seen(0.0, None, ReplicaPhase.LOADING)) is None
    shown = it.observe(seen(5.0, None, ReplicaPhase.LOADING))
    assert shown == {
        "power_w": 244.0,
        "idle_power_w": 144.0,
        "joules_per_output_token": None,
        "sources": ["model"],
        "joules": {"model idle": 720.0, "model serving": 1220.0},
    }
    assert it.ledger.gauges() == []
    # The process has ended: its devices are idle.
    shown = it.observe(seen(10.0, None, ReplicaPhase.GONE))
    assert shown is not None
    assert (shown["power_w"], shown["idle_power_w"]) == (0.0, 288.0)


def test_counted_devices_are_not_modelled_and_tokens_divide_joules() -> None:
    it = meter(Counted(gpu_0=1000.0, gpu_1=2000.0, gpu_2=300.0), run=at_once)
    for now_s in range(16):
        tokens = EngineWork(steps=now_s, output_tokens=now_s * 100, gaps=now_s, gap_s=now_s * 0.5)
        it.observe(seen(float(now_s), tokens, ReplicaPhase.READY))
    # The first entry begins at 0; a reading that is begun is entered a round later.
    joules = it.ledger.counters()["oserve_energy_joules"]
    assert joules["nvml\tserving"] == [6000.0]
    assert joules["nvml\tidle"] == [600.0]
    # The fourth device has no counter.
    assert joules["model\tidle"] == [72.0 * 12]
    assert it.ledger.gauges() == [("oserve_joules_per_output_token", [], 6000 / 1200)]


def test_a_reading_that_never_returns_leaves_the_model() -> None:
    hung: list[Callable[[], None]] = []
    it = meter(Counted(gpu_0=1e6), run=hung.append)
    for now_s in range(31):
        it.observe(seen(float(now_s), None, ReplicaPhase.READY))
    assert len(hung) == 1
    joules = it.ledger.counters()["oserve_energy_joules"]
    assert joules == {"model\tserving": [2 * 122.0 * 30], "model\tidle": [2 * 72.0 * 30]}
    # It returns after all: what it counted has been entered.
    hung[0]()
    it.observe(seen(31.0, None, ReplicaPhase.READY))
    assert "nvml\tserving" not in it.ledger.counters()["oserve_energy_joules"]
    it.observe(seen(36.0, None, ReplicaPhase.READY))
    assert len(hung) == 2


def test_devices_of_an_unknown_kind_have_no_figure() -> None:
    it = meter(run=at_once)
    devices = (Device(id="gpu:0", kind="RTX9090"), Device(id="gpu:1", kind="RTX9090"))
    it.observe(seen(0.0, None, ReplicaPhase.READY, devices=devices))
    assert it.observe(seen(5.0, None, ReplicaPhase.READY, devices=devices)) is None


def test_a_fault_in_metering_is_logged_once_and_raises_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(shape: ReplicaShape, kind: str) -> TokenCosts:
        raise RuntimeError(f"no costs of {shape.name} on {kind}")

    it = EnergyMeter(GPUS, broken, counters=[])
    for now_s in (0.0, 5.0, 10.0):
        assert it.observe(seen(now_s, None, ReplicaPhase.READY)) is None
    assert caplog.text.count("RuntimeError: no costs") == 1


def test_readings_run_in_a_thread() -> None:
    done = threading.Event()
    in_thread(done.set)
    assert done.wait(30.0)
