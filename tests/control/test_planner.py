"""What the controller's planner proposes."""

from dataclasses import replace

from control.toy import TABLE, plan_of, planner
from oserve.control.planner import TablePlanner


def names(made: TablePlanner, rates: tuple[float, float]) -> list[set[str]]:
    found = made.candidates(rates, plan_of(0, 0, 0, 0))
    return [{spec.shape.name for spec in plan.replicas} for plan in found]


def test_one_shape_is_enough_where_one_type_comes() -> None:
    assert names(planner(), (4.0, 0.0))[0] == {TABLE[0].shape.name}


def test_several_shapes_stay_where_they_are_asked_for() -> None:
    """Else a controller would undo after a minute what the first plan was told to have."""
    made = planner()
    made = TablePlanner(replace(made.facts, min_shapes=2))
    assert names(made, (4.0, 0.0)) == [{row.shape.name for row in TABLE}]
    # One of them cannot be started: better one shape than none.
    made.barred = frozenset({TABLE[1].shape})
    assert names(made, (4.0, 0.0))[0] == {TABLE[0].shape.name}
