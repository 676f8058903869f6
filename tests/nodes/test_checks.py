"""What the facts of an examination mean."""

import dataclasses
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from oserve.nodes.checks import (
    CLUSTER,
    NodeFinding,
    NodeVerdict,
    exit_code,
    judge,
    measuring_rounds,
    worst,
)
from oserve.nodes.examination import (
    ClockFacts,
    GpuFacts,
    InterfaceFacts,
    LinkFacts,
    MachineFacts,
    ModelFile,
    ModelFilesFacts,
    NodeExamination,
)
from oserve.nodes.machine import examine_gpus, examine_interfaces, of_keeper
from oserve.nodes.model_files import digest_of, examine_model

GOOD = MachineFacts(
    oserve="1",
    python="3.12.1",
    engine="0.1",
    driver="550",
    cores=8,
    memory_bytes=64 << 30,
    free_bytes=60 << 30,
    shared_memory_bytes=8 << 30,
    open_files=1 << 20,
    gpus=(GpuFacts(name="gpu:0", kind="H100", memory_bytes=80 << 30),),
    interfaces=(InterfaceFacts(name="eth0", mtu=9000, speed_mbps=100_000),),
)


def node(name: str = "a", **changed: object) -> NodeExamination:
    return NodeExamination(node=name, machine=msgspec.structs.replace(GOOD, **changed))


def bad(*nodes: NodeExamination) -> list[NodeFinding]:
    return [finding for finding in judge(nodes) if finding.verdict is not NodeVerdict.OK]


machines = st.builds(
    MachineFacts,
    oserve=st.sampled_from(["1", "2"]),
    engine=st.sampled_from(["", "0.1"]),
    cores=st.integers(0, 4),
    memory_bytes=st.integers(0, 1 << 40),
    free_bytes=st.integers(0, 1 << 40),
    shared_memory_bytes=st.integers(0, 1 << 34),
    open_files=st.integers(0, 1 << 20),
    gpus=st.lists(
        st.builds(
            GpuFacts,
            name=st.just("gpu:0"),
            mig=st.booleans(),
            strangers=st.sampled_from([(), ("game (process 7)",)]),
        ),
        max_size=2,
    ).map(tuple),
    model=st.none() | st.builds(ModelFilesFacts, error=st.sampled_from(["", "unread"])),
)
links = st.builds(
    LinkFacts,
    target=st.just("b"),
    round_trip_s=st.floats(0, 1),
    bytes_per_s=st.floats(0, 1e10),
    error=st.sampled_from(["", "cut off"]),
)
examinations = st.builds(
    NodeExamination,
    node=st.sampled_from(["a", "b", "c"]),
    machine=st.none() | machines,
    clock=st.none() | st.builds(ClockFacts, ahead_s=st.floats(-1e3, 1e3), within_s=st.floats(0, 1)),
    links=st.lists(links, max_size=2).map(tuple),
    unreached=st.sampled_from(["", "no answer"]),
)


@settings(max_examples=30)
@given(st.lists(examinations, max_size=3, unique_by=lambda item: item.node))
def test_whatever_is_not_well_has_a_remedy(nodes: list[NodeExamination]) -> None:
    findings = judge(nodes)
    for finding in findings:
        assert finding.found
        assert bool(finding.remedy) == (finding.verdict is not NodeVerdict.OK)
        assert finding.node in {CLUSTER, *(item.node for item in nodes)}
    failed = any(finding.verdict is NodeVerdict.FAIL for finding in findings)
    assert (exit_code(findings, strict=True) == 2) == failed
    assert exit_code(findings, strict=False) == (2 if failed else 0)


def test_a_good_cluster_has_no_complaints() -> None:
    assert bad(node("a"), node("b")) == []
    assert worst(judge([node()])) is NodeVerdict.OK
    assert exit_code([], strict=True) == 0


def test_each_fault_is_found() -> None:
    gpu = GOOD.gpus[0]
    cases = (
        ({"engine": ""}, "vllm", NodeVerdict.WARN, "attached"),
        ({"cores": 1}, "cores", NodeVerdict.WARN, "1 usable"),
        ({"free_bytes": 1 << 30}, "memory", NodeVerdict.WARN, "1.0 of 64.0 GiB"),
        ({"shared_memory_bytes": 64 << 20}, "/dev/shm", NodeVerdict.FAIL, "64 MiB"),
        ({"shared_memory_bytes": 512 << 20}, "/dev/shm", NodeVerdict.WARN, "512 MiB"),
        ({"open_files": 1024}, "open files", NodeVerdict.WARN, "1,024"),
        ({"gpus": (msgspec.structs.replace(gpu, mig=True),)}, "gpu:0", NodeVerdict.FAIL, "MIG"),
        (
            {"gpus": (msgspec.structs.replace(gpu, strangers=("game (process 7)",)),)},
            "gpu:0",
            NodeVerdict.FAIL,
            "game",
        ),
        ({"model": ModelFilesFacts()}, "model", NodeVerdict.WARN, "not here"),
    )
    for changed, check, verdict, said in cases:
        [finding] = bad(node(**changed))
        assert (finding.check, finding.verdict) == (check, verdict)
        assert said in finding.found


def test_nodes_that_differ() -> None:
    for changed, check, verdict in (
        ({"oserve": "2"}, "oserve", NodeVerdict.FAIL),
        ({"engine": "0.2"}, "vllm", NodeVerdict.FAIL),
        ({"python": "3.13.0"}, "python", NodeVerdict.WARN),
        ({"driver": "560"}, "driver", NodeVerdict.WARN),
        ({"interfaces": (InterfaceFacts(name="eth0", mtu=1500),)}, "mtu", NodeVerdict.WARN),
    ):
        [finding] = bad(node("a"), node("b"), node("c", **changed))
        assert (finding.node, finding.check, finding.verdict) == (CLUSTER, check, verdict)
        assert "on a, b; " in finding.found
    files = [
        ModelFilesFacts(files=(ModelFile(name="config.json", size_bytes=1, digest=digest),))
        for digest in ("x", "y")
    ]
    [finding] = bad(node("a", model=files[0]), node("b", model=files[1]))
    assert finding.verdict is NodeVerdict.FAIL
    assert "config.json differs" in finding.found
    assert bad(node("a", model=files[0]), node("b", model=files[0])) == []


def test_links_and_clocks() -> None:
    def verdict(**facts: object) -> NodeVerdict:
        link = msgspec.convert({"target": "b", **facts}, LinkFacts)
        return worst(judge([NodeExamination(node="a", links=(link,))]))

    assert verdict(round_trip_s=1e-4, bytes_per_s=1e9) is NodeVerdict.OK
    assert verdict(round_trip_s=1e-4) is NodeVerdict.OK
    assert verdict(round_trip_s=1e-4, bytes_per_s=1e7) is NodeVerdict.WARN
    assert verdict(round_trip_s=0.1) is NodeVerdict.WARN
    assert verdict(error="cut off") is NodeVerdict.FAIL
    for ahead_s, within_s, said in ((-2.0, 0.1, NodeVerdict.WARN), (2.0, 1.9, NodeVerdict.OK)):
        clock = ClockFacts(ahead_s=ahead_s, within_s=within_s)
        assert worst(judge([NodeExamination(node="a", clock=clock)])) is said
    [finding] = judge([NodeExamination(node="a", unreached="no answer")])
    assert dataclasses.asdict(finding)["check"] == "reach"


@settings(max_examples=30)
@given(st.integers(0, 40), st.integers(1, 300))
def test_rounds_measure_each_pair_once_and_keep_nodes_apart(count: int, most: int) -> None:
    names = [f"n{index}" for index in range(count)]
    rounds = measuring_rounds(names, most)
    pairs = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(set(pairs)) == len(pairs) <= most
    for pairs_at_once in rounds:
        busy = [name for pair in pairs_at_once for name in pair]
        assert len(set(busy)) == len(busy)
    if count * (count - 1) // 2 <= most:
        assert len(pairs) == count * (count - 1) // 2
    elif most >= count // 2:
        assert len(set().union(*pairs)) >= count - 1


def test_the_answers_of_nvidia_smi(tmp_path: Path) -> None:
    gpus, driver = examine_gpus(
        "0, NVIDIA H100 80GB HBM3, 81559, GPU-a\n1, NVIDIA H100 80GB HBM3, 81559, GPU-b\n",
        "GPU-a, 550.54.15, Disabled, 4\nGPU-b, 550.54.15, Enabled, [N/A]\n",
        f"GPU-a, {1 << 30}, /home/someone/game\n",
    )
    assert driver == "550.54.15"
    assert [gpu.mig for gpu in gpus] == [False, True]
    assert gpus[0].strangers == (f"game (process {1 << 30})",)
    assert gpus[0].used_bytes == 4 << 20
    assert examine_gpus("", "", "nothing") == ((), "")
    for pid, parent, command in ((9, 8, "vllm"), (8, 1, "python -m oserve.engines.keeper")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_text(command.replace(" ", "\0"))
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a ) b) S {parent} 0")
    assert of_keeper(9, tmp_path)
    assert not of_keeper(7, tmp_path)


def test_interfaces_that_are_up(tmp_path: Path) -> None:
    for name, state in (("lo", "up"), ("eth0", "up"), ("eth1", "down")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "operstate").write_text(f"{state}\n")
        (tmp_path / name / "mtu").write_text("1500\n")
    assert examine_interfaces(tmp_path) == (InterfaceFacts(name="eth0", mtu=1500),)
    assert examine_interfaces(tmp_path / "none") == ()


def test_files_of_a_model(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "r1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "notes").write_text("of no interest")
    assert not examine_model("some/model", tmp_path).files
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("r1")
    found = examine_model("some/model", tmp_path)
    assert found == examine_model(str(snapshot))
    [file] = found.files
    assert (file.name, file.size_bytes, file.sampled) == ("config.json", 2, False)
    large = tmp_path / "m.safetensors"
    with large.open("wb") as target:
        target.truncate(17 << 20)
    before = digest_of(large)
    assert before.sampled
    with large.open("r+b") as target:
        target.seek(-1, 2)
        target.write(b"x")
    assert digest_of(large).digest != before.digest
