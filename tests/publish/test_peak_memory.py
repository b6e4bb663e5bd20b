"""What a publication takes while it runs: nobody ever holds the whole model a second time, two buckets at most."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import lacking
from tests.publish.peaks import BUCKET, MB, WAYS

ALLOWANCE = 4 * MB
"""For code that runs for the first time, messages, and blocks that are worked on."""


@pytest.fixture(scope="module")
def publications(tmp_path_factory):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        lacking("the peak of a process's memory cannot be reset here: /proc/self/clear_refs is missing")
    command = [sys.executable, "-m", "tests.publish.peaks", str(tmp_path_factory.mktemp("peaks"))]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", WAYS)
def test_nobody_holds_more_than_two_buckets(publications, way):
    for found in publications[way]:
        assert found["nbytes"] > 9 * BUCKET
        assert {name: rise for name, rise in found["rise"].items() if rise > 2 * BUCKET + ALLOWANCE} == {}


def test_a_delta_sends_what_changed_unless_that_is_most(publications):
    first, little, all_of_it = publications["delta"]
    assert (first["changed"], first["sent"]) == (None, first["nbytes"])
    assert little["changed"] == little["sent"] == pytest.approx(1.5 * 0.04 * little["nbytes"], rel=0.1)
    assert all_of_it["changed"] == pytest.approx(1.5 * all_of_it["nbytes"], rel=0.1)
    assert all_of_it["sent"] == all_of_it["nbytes"]
