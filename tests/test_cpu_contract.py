"""The contract on the CPU kernels, with the tiles of the plan and with tiles so small that every edge is met."""

from __future__ import annotations

import pytest
from contract import Contract

from numba_attn.cpu import attention
from numba_attn.cpu.plan import Plan, plan


@pytest.fixture(params=["planned", "7 keys, 1 block, split", "16 keys or 40, 2 blocks"], scope="class", autouse=True)
def tiles(request: pytest.FixtureRequest) -> object:
    """Cut every problem of a test class one way."""
    if request.param == "planned":
        yield
        return
    whole = 1 << 40
    keys, short, blocks, split = (7, 0, 1, 7) if request.param.startswith("7") else (16, 40, 2, whole)

    def small(heads: int, Lq: int, *rest: int) -> Plan:
        cut, group = plan(heads, Lq, *rest), rest[-2]
        tasks = -(-Lq // (cut.block * blocks))
        return Plan(keys, short, cut.block, blocks, tasks, cut.heads if split == whole else group, split)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "plan", small)
        yield


class TestCpu(Contract):
    backend = "cpu"
