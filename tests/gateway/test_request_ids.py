"""Ids of requests."""

import re

from oserve.gateway.http.request_ids import RequestIds


def test_ids_are_distinct_and_well_formed_past_one_reading_of_randomness() -> None:
    ids = RequestIds()
    found = [ids.take() for _ in range(1000)]
    assert len(set(found)) == 1000
    assert all(re.fullmatch(rb"[0-9a-f]{32}", item) for item in found)
