"""The policy needs neither Ray nor our own processes: torchrun starts its ranks as well."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.policy.lives import Life
from tests.policy.under_torchrun import run


@pytest.mark.long
def test_two_ranks_under_torchrun_do_what_two_plain_processes_do(lives: Callable[[str], Life], qwen3: Path) -> None:
    updates = run(qwen3, 2)["updates"]
    assert len({update["grad_norm"] for update in updates}) == 3
    assert updates == [dataclasses.asdict(report.updates[0]) for report in lives("dp2").reports]
