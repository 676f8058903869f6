"""How a Ray cluster is named."""

import pytest

from oserve.core import OServeError
from oserve.nodes.ray_address import check_ray_address, is_ray, own_ray_address, ray_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ray", ""),
        ("ray:head:6379", "head:6379"),
        ("ray:10.0.0.1:6379", "10.0.0.1:6379"),
        ("ray:[fd00::1]:6379", "[fd00::1]:6379"),
    ],
)
def test_addresses(text: str, address: str) -> None:
    assert is_ray(text)
    assert ray_address(text) == address


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ray://head:10001", "Ray Client"),
        ("ray:head", "no address"),
        ("ray:", "no address"),
        ("ray:head:0", "no address"),
        ("ray:head:99999", "no address"),
        ("8xH100", "names no Ray cluster"),
    ],
)
def test_others_are_refused_with_a_remedy(text: str, said: str) -> None:
    with pytest.raises(OServeError, match=said) as caught:
        ray_address(text)
    assert "6379" in caught.value.remedy


def test_the_environment_may_name_the_local_one() -> None:
    assert own_ray_address({}) == own_ray_address({"RAY_ADDRESS": "auto"}) == ""
    assert own_ray_address({"RAY_ADDRESS": "head:6379"}) == "head:6379"
    assert check_ray_address("[fd00::1]:6379") == ("fd00::1", 6379)
