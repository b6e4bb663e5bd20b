import os
import shutil

import pytest


@pytest.fixture(scope="session")
def require_tool():
    """`require_tool(name)`: the path of a program; without it the test is skipped, on CI it fails."""

    def require(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            reason = f"{name} is not installed"
            if os.environ.get("CI"):
                pytest.fail(f"{reason}; on CI every test must run")
            pytest.skip(reason)
        return path

    return require
