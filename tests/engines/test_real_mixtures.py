"""A mixture of experts: its weights move between real engines as others' do."""

from pathlib import Path

import pytest

from engines.mixtures import make_mixture_variant
from engines.stage import plan_of, replica, staged
from oserve.engines.spawner import Launcher

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


async def test_experts_move_with_the_rest(
    tiny_model: Path, tmp_path: Path, zygote: Launcher
) -> None:
    mixture = make_mixture_variant(tiny_model, tmp_path / "mixture")
    first = plan_of("one", replica("a", "cpu:0"))
    async with staged(mixture, tmp_path, first, {}, zygote) as stage:
        for name, tp, pp in (("w", 2, 1), ("p", 1, 2), ("s", 1, 1)):
            devices = ("cpu:0", "cpu:1") if tp * pp == 2 else ("cpu:2",)
            plan = plan_of(name, replica(name, *devices, tp=tp, pp=pp))
            report = await stage.switch(plan)
            assert report.state == "done", report
            await stage.at(name)
            assert await stage.answers(name) == stage.reference
