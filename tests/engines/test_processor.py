"""What a processor says of itself, and which plain precision that calls for."""

import pytest

from oserve.config import load_settings
from oserve.core import Device, OServeError, Precision
from oserve.engines.processor import find_processor, parse_cpuinfo, plain_precisions

CPU = (Device(id="cpu:0", kind="cpu"),)
X86 = """processor\t: 0
model name\t: Some Processor @ 2.50GHz
flags\t\t: fpu avx2 avx512f {more}
vmx flags\t: vnmi
bugs\t\t: none
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd {more}\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("text", "more", "has_bf16"),
    [
        (X86, "", False),
        (X86, "avx512_vnni", False),
        (X86, "avx512_bf16", True),
        (X86, "amx_bf16 amx_tile", True),
        (ARM, "i8mm", False),
        (ARM, "i8mm bf16", True),
        ("", "", False),
    ],
)
def test_bf16_is_read_from_the_flags(text: str, more: str, has_bf16: bool) -> None:
    found = parse_cpuinfo(text.format(more=more))
    assert found.has_bf16 is has_bf16
    assert found.name == ("Some Processor @ 2.50GHz" if text is X86 else "CPU")
    expected = (Precision.BF16, Precision.FP32) if has_bf16 else (Precision.FP32,)
    assert plain_precisions(CPU, found) == expected


def test_flags_that_are_set_win() -> None:
    assert find_processor("avx2, avx512_bf16").flags == {"avx2", "avx512_bf16"}
    assert not find_processor("").has_bf16
    assert find_processor("avx2").name == find_processor().name
    for bad in ("avx512-bf16", "auto avx2"):
        with pytest.raises(OServeError) as caught:
            find_processor(bad)
        assert caught.value.place == "cluster.cpu_flags"


def test_the_environment_sets_them() -> None:
    given = load_settings(None, {}, {"OSERVE_CLUSTER_CPU_FLAGS": "avx2 amx_bf16"})
    assert find_processor(given.cluster.cpu_flags).has_bf16


def test_a_gpu_asks_no_processor() -> None:
    gpu = (Device(id="gpu:0", kind="H100"),)
    assert plain_precisions(gpu, find_processor("avx2")) == (Precision.BF16,)
