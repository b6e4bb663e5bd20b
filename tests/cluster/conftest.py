"""A run that others are compared with."""

from pathlib import Path

import pytest

from tests.cluster.whole_runs import finish, segments, start


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A run that nobody disturbs."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    finish(start(run))
    assert not segments(run)
    return run
