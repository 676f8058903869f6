"""Devices of a machine."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oserve.core import OServeError
from oserve.engines.devices import find_devices, parse_gpu_users, parse_gpus, split_cores


def test_gpus_are_parsed() -> None:
    listing = """0, NVIDIA H100 80GB HBM3, 81559, GPU-5d8a7b1c-93d1-7f5e-1b2c-0a1b2c3d4e5f
1, NVIDIA A100-SXM4-80GB, 81920, GPU-6d8a7b1c-93d1-7f5e-1b2c-0a1b2c3d4e5f
2, NVIDIA GeForce RTX 4090, 24564, GPU-7d8a7b1c-93d1-7f5e-1b2c-0a1b2c3d4e5f
3, Tesla T4, [N/A], [N/A]
"""
    devices = parse_gpus(listing)
    assert [device.id for device in devices] == ["gpu:0", "gpu:1", "gpu:2", "gpu:3"]
    assert [device.kind for device in devices] == ["H100", "A100", "RTX4090", "T4"]
    assert devices[0].memory_bytes == 81559 * 1024 * 1024
    assert devices[3].memory_bytes == 0
    assert devices[0].uuid == "GPU-5d8a7b1c-93d1-7f5e-1b2c-0a1b2c3d4e5f"
    assert devices[3].uuid == ""


def test_programs_that_use_gpus_are_parsed() -> None:
    listing = """GPU-5d8a7b1c, 4242, /usr/bin/python, odd name
GPU-5d8a7b1c, 4243, another
No running processes found
"""
    users = parse_gpu_users(listing)
    assert users == {"GPU-5d8a7b1c": "/usr/bin/python, odd name (process 4242)"}


def test_what_is_no_gpu_is_passed_over() -> None:
    assert parse_gpus("NVIDIA-SMI has failed because it couldn't communicate\n\n") == ()


@given(cores=st.integers(1, 64), slots=st.integers(1, 64))
def test_cores_are_dealt_evenly(cores: int, slots: int) -> None:
    devices = split_cores(range(cores), slots)
    assert len(devices) == slots
    sizes = {len(device.cores) for device in devices}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    dealt = [core for device in devices for core in device.cores]
    assert set(dealt) == set(range(min(cores, len(dealt))))
    if slots <= cores:
        assert sorted(dealt) == list(range(cores))


def test_default_is_two_to_eight_slots() -> None:
    assert len(split_cores(range(1))) == 2
    assert len(split_cores(range(4))) == 4
    assert len(split_cores(range(64))) == 8


def test_this_machine_has_cpu_slots() -> None:
    devices = find_devices("cpu", 1)
    assert set(devices[0].cores) == os.sched_getaffinity(0)
    assert devices[0].memory_bytes > 0


def test_bad_wishes_are_told() -> None:
    with pytest.raises(OServeError):
        find_devices("tpu")
    with pytest.raises(OServeError):
        find_devices("cpu", 0)
