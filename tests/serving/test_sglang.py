"""SGLang as a process: its command line, what it says when it fails, and that nothing of it outlives its launcher."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from megatron_fapo.errors import ConfigError, ServerError
from megatron_fapo.serving.client import ServerClient
from megatron_fapo.serving.launcher import launch_one, processes
from megatron_fapo.serving.settings import ServerSettings
from megatron_fapo.serving.sglang.command import INSIDE, command, environment
from megatron_fapo.serving.sglang.launch import _key_file
from tests.conftest import lacking
from tests.serving.conformance import SGLANG, settings
from tests.serving.worlds import CONTEXT


def given(**sglang) -> ServerSettings:
    return ServerSettings.model_validate({"model": "m", "engine": "sglang", "sglang": sglang})


def test_the_command_line_says_what_the_settings_say():
    line = command(given(tensor_parallel=4, memory_fraction=0.7, arguments=["--log-level", "debug"]), 31000, None)
    words = " ".join(line)
    for expected in ("--model-path m", "--port 31000", "--tp-size 4", "--mem-fraction-static 0.7"):
        assert expected in words
    assert line[-2:] == ["--log-level", "debug"]
    assert not {"--device", "--disable-cuda-graph", "--enable-memory-saver"} & set(line)
    on_cpu = command(given(on_cpu=True), 1, None)
    assert {"--sleep-on-idle", "--disable-cuda-graph"} <= set(on_cpu)
    saving = command(given(memory_saver=True), 1, None)
    assert saving[saving.index("--cuda-graph-backend-prefill") + 1] == "disabled"


def test_the_server_sees_nothing_of_our_packages_and_no_allocator_that_cannot_be_paused():
    ours = {"PYTHONPATH": "/somewhere", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HOME": "/h"}
    seen = environment(given(), ours)
    assert (seen["PYTHONPATH"], seen["HOME"], seen["NCCL_CUMEM_ENABLE"]) == (str(INSIDE), "/h", "0")
    assert not {"PYTORCH_CUDA_ALLOC_CONF", "SGLANG_USE_CPU_ENGINE", "SGLANG_MEMORY_SAVER_CUDA_GRAPH"} & seen.keys()
    assert environment(given(on_cpu=True), ours)["SGLANG_USE_CPU_ENGINE"] == "1"
    bound = "SGLANG_CPU_OMP_THREADS_BIND"
    assert bound not in environment(given(on_cpu=True), ours)
    two = given(on_cpu=True, tensor_parallel=2)
    assert len(environment(two, ours)[bound].split("|")) == 2
    assert environment(two, {bound: "0-3|4-7"})[bound] == "0-3|4-7"
    assert environment(given(memory_saver=True), ours)["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] == "1"


def test_the_key_is_in_a_private_file_while_the_server_starts(tmp_path):
    (tmp_path / "key").write_text("open sesame\n")
    locked = given().changed(api_key_file=str(tmp_path / "key"))
    with _key_file(locked, tmp_path / "log") as path:
        assert yaml.safe_load(path.read_text()) == {"api-key": "open sesame"}
        assert path.stat().st_mode & 0o777 == 0o600
        assert "open sesame" not in " ".join(command(locked, 1, path))
    assert not path.exists()


def test_what_the_cpu_cannot_do_is_refused():
    with pytest.raises(ValidationError, match="ignores seeds"):
        given(on_cpu=True).changed(deterministic=True)
    with pytest.raises(ValidationError, match="needs a GPU"):
        given(on_cpu=True, memory_saver=True)


async def test_an_environment_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere/python.*make sglang-cpu"):
        await launch_one(given(python="nowhere/python"), tmp_path / "log", 0)


def members(session: int) -> set[int]:
    """Living processes of a session."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(sid) == session and state not in "ZX":
            found.add(int(entry.name))
    return found


async def until_gone(session: int, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while members(session):
        assert time.monotonic() < deadline, f"still there: {members(session)}"
        await asyncio.sleep(0.05)


@pytest.fixture
def sglang(models, tmp_path) -> ServerSettings:
    if not SGLANG.exists():
        lacking("SGLang's environment is missing: make sglang-cpu")
    (tmp_path / "key").write_text("k")
    return settings("sglang", models[0], tmp_path / "key", CONTEXT)


@pytest.mark.long
async def test_a_server_that_cannot_start_says_why(sglang, tmp_path):
    with pytest.raises(ServerError, match=r"(?s)status \d.*--no-such-flag"):
        await launch_one(
            sglang.changed(sglang=sglang.sglang.changed(arguments=["--no-such-flag"])), tmp_path / "log", 0
        )


@pytest.mark.long
async def test_a_scheduler_that_dies_takes_its_server_along_and_the_log_is_quoted(
    sglang, tmp_path, request_for, prompts
):
    async with processes(sglang, "policy", tmp_path) as (server,), ServerClient(server.url, "k") as client:
        scheduler = next(
            p for p in members(server.pid) if b"sglang::scheduler" in Path(f"/proc/{p}/cmdline").read_bytes()
        )
        os.kill(scheduler, signal.SIGKILL)
        with pytest.raises(ServerError):
            _ = [sample async for sample in client.generate(request_for(prompts[0], max_new_tokens=200))]
        await asyncio.wait_for(server.process.wait(), 60)
        with pytest.raises(ServerError, match=r"(?s)server ended with .*policy-0.log"):
            server.check()
    await until_gone(server.pid)


DRIVER = """
import asyncio, json, pathlib, sys
from megatron_fapo.serving.launcher import launch_one
from megatron_fapo.serving.settings import ServerSettings

async def main():
    folder = pathlib.Path(sys.argv[1])
    settings = ServerSettings.model_validate(json.loads((folder / "settings").read_text()))
    server = await launch_one(settings, folder / "log", 0)
    (folder / "pid").write_text(f"{server.pid}\\n")
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.long
async def test_nothing_of_it_outlives_its_launcher(sglang, tmp_path):
    (tmp_path / "settings").write_text(sglang.model_dump_json())
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, tmp_path], start_new_session=True)
    try:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith("\n"):
            assert driver.poll() is None
            await asyncio.sleep(0.1)
        server = int((tmp_path / "pid").read_text())
        assert len(members(server)) > 1
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    await until_gone(server)
