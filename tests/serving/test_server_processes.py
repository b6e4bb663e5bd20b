"""Server processes: how they start and end, and what is said of those that do not."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_fapo.errors import ServerError
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.launcher import launch, launch_one, processes
from megatron_fapo.serving.process import ServerProcess
from megatron_fapo.serving.settings import ServerSettings
from tests.serving.waiting import collect, until


async def test_a_launched_server_that_is_killed_is_noticed_with_its_log(models, tmp_path, request_for, prompts):
    settings = ServerSettings(model=str(models[0]), count=2)
    async with processes(settings, "policy", tmp_path) as servers:
        assert servers[0].url != servers[1].url
        servers[0].check()
        os.kill(servers[0].pid, signal.SIGKILL)
        await asyncio.wait_for(servers[0].process.wait(), 10)
        with pytest.raises(ServerError, match=r"(?s)status -9.*policy-0.log.*serving"):
            servers[0].check()
        survivor = servers[1]
    assert survivor.process.returncode == 0


async def test_when_no_server_is_left_the_error_quotes_the_log(models, tmp_path, request_for, prompts):
    before = children()
    async with launch(ServerSettings(model=str(models[0]), restarts=0), "policy", tmp_path) as group:
        assert len(await collect(group, request_for(prompts[0]))) == 1
        (pid,) = children() - before
        os.kill(pid, signal.SIGKILL)
        await until(lambda: pid not in children())
        with pytest.raises(ServerError, match=r"(?s)ended with (status -9|an unknown status).*serving"):
            await collect(group, request_for(prompts[0]))


async def test_killing_a_server_that_has_just_died_leaves_its_status_readable(tmp_path):
    """At ever later moments between its death and the one at which asyncio hears of it."""
    statuses = set()
    for turn in range(200):
        process = await asyncio.create_subprocess_exec("sleep", "100")
        server = ServerProcess(url="", pid=process.pid, log=tmp_path / "log", process=process)
        os.kill(process.pid, signal.SIGTERM)
        moment = time.perf_counter() + turn * 2e-5
        while time.perf_counter() < moment:
            pass
        server.kill()
        await server.wait()
        statuses.add(process.returncode)
    assert statuses <= {-signal.SIGTERM, -signal.SIGKILL}


def children():
    """Process ids of our own running servers."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z" and b"engine.main" in (process / "cmdline").read_bytes():
                found.add(int(process.name))
    return found


async def test_a_server_that_cannot_start_says_why(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    settings = ServerSettings(model=str(tmp_path / "nothing"))
    with pytest.raises(ServerError, match=r"(?s)status 2.*no config.json"):
        await launch_one(settings, tmp_path / "log", 0)


DRIVER = """
import asyncio, pathlib, signal, sys
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.launcher import launch_one
from megatron_fapo.serving.settings import ServerSettings

async def main():
    model, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    interrupted = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)
    server = await launch_one(ServerSettings(model=model), folder / "log", 0)
    (folder / "pid").write_text(f"{server.pid}\\n")
    await interrupted.wait()
    async with ServerClient(server.url) as client:
        (folder / "saved").write_text(await client.checksum() + "\\n")
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_servers_outlive_a_ctrl_c_and_end_with_the_process_that_launched_them(models, tmp_path):
    """Ctrl-C goes to the process group of the terminal; the driver then still needs its servers to save."""

    def said(name):
        path = tmp_path / name
        return path.exists() and path.read_text().endswith("\n")

    driver = subprocess.Popen([sys.executable, "-c", DRIVER, models[0], tmp_path], start_new_session=True)
    try:
        await until(lambda: said("pid"), 60)
        server = int((tmp_path / "pid").read_text())
        os.killpg(driver.pid, signal.SIGINT)
        await until(lambda: said("saved") or driver.poll() is not None, 20)
        assert driver.poll() is None
        assert alive(server)
    finally:
        driver.kill()
        driver.wait()
    await until(lambda: not alive(server))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(")")[1].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


async def test_a_server_told_to_stop_does_not_wait_for_what_runs(models, tmp_path, request_for, prompts):
    async with processes(ServerSettings(model=str(models[0])), "policy", tmp_path) as (server,):
        async with ServerClient(server.url) as client:
            await client.pause()
            waiting = asyncio.ensure_future(collect(client, request_for(prompts[0])))
            while (await client.info())["waiting"] == 0:
                await asyncio.sleep(0.01)
            await server.stop()
            assert server.process.returncode == 0  # by itself, not killed
            with pytest.raises(ServerError):
                await waiting
