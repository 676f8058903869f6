"""The same switches by different methods: the gain of moving weights."""

from collections.abc import Sequence
from dataclasses import replace

from oserve.study.control import LoadCourse, course_of, library, own
from oserve.study.controller_policy import controller_policy, with_start
from oserve.study.ours import OServeTuner
from oserve.study.policy import Fixed, Policy, PolicyStart
from oserve.study.runner import run_policy
from oserve.study.switching import Oracle

WAYS = {"restarted": PolicyStart.COLD, "weights moved": PolicyStart.TRANSFER}
"""How replicas start, by the name of the row."""


def ways(tuner: OServeTuner, factors: Sequence[float]) -> list[LoadCourse]:
    """The switches of an oracle, at multiples of what static-best-tuned carries.

    The oracle knows the future and switches in no time. Then the runner makes the same switches at
    the same seconds by restarts from disk and by transfer. ``never``: the first deployment stays.
    """
    serving = own(tuner).serving
    follower = controller_policy(tuner, start=PolicyStart.TRANSFER, serving=serving)
    oracle = Oracle(tuner=tuner, serving=serving, library=library(tuner, follower))
    found = []
    for factor in factors:
        scale = factor * tuner.best_tuned.scale
        run = run_policy(tuner.scene, oracle, tuner.simulator, scale)
        script = [(float(round(item.at_s)), item.plan) for item in run.changes[1:]]
        policies: dict[str, Policy] = {
            "never": Fixed(serving=serving),
            **{
                name: replace(with_start(tuner.scene, follower, start), script=script)
                for name, start in WAYS.items()
            },
            "in no time": oracle,
        }
        for name, policy in policies.items():
            made = (
                run if policy is oracle else run_policy(tuner.scene, policy, tuner.simulator, scale)
            )
            found.append(course_of(tuner, name, factor, made))
    return found
