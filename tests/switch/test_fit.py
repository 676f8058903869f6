"""Costs fitted to measured switches: the constants that made the phases are found again."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from oserve.config import load_switch_costs
from oserve.core import OServeError
from oserve.switch.costs import SwitchCosts
from oserve.switch.fit import (
    MeasuredSwitch,
    costs_document,
    fit_costs,
    left_out_errors,
    predicted_s,
)

SECONDS = st.floats(0.01, 50)


def switch_of(costs: SwitchCosts, engines: int, busy_s: float) -> MeasuredSwitch:
    blank = MeasuredSwitch(
        engines=engines,
        busy_s=busy_s,
        given_bytes=int(busy_s * 1e9),
        prepare_s=0.0,
        transfer_s=0.0,
        verify_s=0.0,
        commit_s=0.0,
        drain_s=0.0,
    )
    told = predicted_s(costs, blank)
    return replace(
        blank,
        prepare_s=told["prepare"],
        transfer_s=told["transfer"],
        verify_s=told["verify"],
        commit_s=told["commit"],
        drain_s=told["drain"],
    )


@given(
    SECONDS,
    SECONDS,
    SECONDS,
    st.floats(0.02, 1),
    st.lists(st.tuples(st.integers(1, 8), SECONDS), min_size=2, max_size=12),
)
def test_what_made_the_phases_is_found_again(
    start_s: float, further_s: float, join_s: float, share: float, plans: list[tuple[int, float]]
) -> None:
    true = SwitchCosts(
        engine_start_s=start_s,
        further_start_s=further_s,
        join_s=join_s,
        link_share=share,
        check_s_per_byte=further_s * 1e-9,
    )
    measured = [switch_of(true, *plan) for plan in plans]
    found = fit_costs(measured)
    assert found.engine_start_s >= 0
    assert found.further_start_s >= 0
    assert found.join_s >= 0
    assert 0 < found.link_share <= 1
    for one in measured:
        told = predicted_s(found, one)
        assert told["prepare"] == pytest.approx(one.prepare_s, rel=1e-6)
        assert told["transfer"] == pytest.approx(one.transfer_s, rel=1e-4)
        assert told["verify"] == pytest.approx(one.verify_s, rel=1e-4)
    if len({engines for engines, _ in plans}) > 1:
        assert found.engine_start_s == pytest.approx(start_s, rel=1e-6)
        assert found.further_start_s == pytest.approx(further_s, rel=1e-6)


def test_errors_are_of_costs_that_have_not_seen_the_switch() -> None:
    true = SwitchCosts(verify_s=2.0)
    measured = [switch_of(true, engines, 1.0 * engines) for engines in (1, 2, 3)]
    assert left_out_errors(measured) == pytest.approx([0, 0, 0], abs=1e-6)
    late = replace(measured[0], prepare_s=measured[0].prepare_s + 4)
    assert left_out_errors([late, *measured[1:]])[0] < -0.2
    assert left_out_errors(measured[:1]) == []
    with pytest.raises(OServeError, match="no switch was measured"):
        fit_costs([])


def test_a_file_of_them_is_read_back(tmp_path: Path) -> None:
    costs = replace(SwitchCosts(), engine_start_s=2.5, link_share=0.25)
    path = tmp_path / "costs.yaml"
    path.write_text(yaml.safe_dump(costs_document(costs)), encoding="utf-8")
    assert load_switch_costs(str(path)) == costs
    path.write_text("verify_s: 3\n", encoding="utf-8")
    assert load_switch_costs(str(path)) == replace(SwitchCosts(), verify_s=3.0)
    for text, told in (
        ("verify: 3", "verify_s"),
        ("link_share: 1.5", "link_share"),
        ("join_s: -1", "join_s"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(OServeError) as error:
            load_switch_costs(str(path))
        assert told in str(error.value)
