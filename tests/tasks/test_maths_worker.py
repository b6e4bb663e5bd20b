"""The worker process by itself: what ends it while it is deep in a computation."""

import json
import os
import signal
import subprocess
import sys
import time

HANGING = "9^{9^{9}}"
"""Minutes in one call of C code, in which neither a signal handler of Python's nor another thread gets a turn."""

DRIVER = f"""
import asyncio, pathlib, sys
from megatron_fapo.tasks.maths_checker import MathsChecker

async def main():
    checker = MathsChecker(workers=1, deadline=600.0)
    assert await checker.compare("3", "3.0") == "equal"
    hanging = asyncio.create_task(checker.compare("3", {HANGING!r}))
    await asyncio.sleep(0)
    path = pathlib.Path(sys.argv[1])
    path.with_suffix(".part").write_text(str(checker._workers[0]._process.pid))
    path.with_suffix(".part").rename(path)
    await hanging

asyncio.run(main())
"""


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def state(pid):
    """(letter, processor seconds) of a process; ("X", 0) when there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except FileNotFoundError:
        return "X", 0.0
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_hanging_worker_outlives_a_ctrl_c_but_not_a_killed_driver(tmp_path):
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, tmp_path / "pid"], start_new_session=True)
    try:
        until((tmp_path / "pid").exists, 60)
        worker = int((tmp_path / "pid").read_text())
        before = state(worker)[1]
        until(lambda: state(worker)[1] > before + 0.3, 30)  # it computes, and reads no more input
        assert os.getpgid(worker) != os.getpgid(driver.pid)
    finally:
        driver.kill()
        driver.wait()
    until(lambda: state(worker)[0] in "ZX", 5)


def test_a_comparison_has_so_much_processor_time():
    """Without a launcher to be tied to. The time is each comparison's own: a worker answers any number of them."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "megatron_fapo.tasks.maths_worker", "0", "1"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def ask(answer):
        worker.stdin.write(json.dumps({"reference": "3", "answer": answer}) + "\n")
        worker.stdin.flush()
        return worker.stdout.readline()

    try:
        assert worker.stdout.readline() == "ready\n"
        assert [ask(answer) for answer in ("3.0", "4", "3.0")] == ["equal\n", "different\n", "equal\n"]
        assert ask(HANGING) == ""
        assert worker.wait(10) == -signal.SIGXCPU
    finally:
        worker.kill()
        worker.communicate()
