"""A real Slurm of two nodes on this machine."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.conftest import lacking

HERE = Path(__file__).parent
HOSTS = "127.0.0.1 localhost\n10.77.0.254 controller\n10.77.0.1 n1\n10.77.0.2 n2\n"
APART = ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two nodes and a controller."""

    folder: Path
    inside: int
    """Process id of the first process in the controller's namespace."""

    def run(self, *command: str, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
        """What a command prints on the login node."""
        enter = ["nsenter", "-t", str(self.inside), "-n", "-p", "-m", "-u", f"--wd={cwd or Path.cwd()}"]
        done = subprocess.run(
            [*enter, "env", f"SLURM_CONF={self.folder}/slurm.conf", *command],
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def said(self) -> str:
        """All logs, for an error."""
        return "\n".join(f"== {log}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.[lo][ou][gt]")))


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    for tool in ("slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            lacking(f"{tool} is not installed (Debian: slurm-wlm, iproute2, util-linux)")
    if os.geteuid() or subprocess.run([*APART, "true"], capture_output=True, check=False).returncode:
        pytest.skip("making network namespaces is not permitted here")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "hosts").write_text(HOSTS)
    (folder / "slurm.conf").write_text((HERE / "slurm.conf").read_text().replace("@FOLDER@", str(folder)))
    log = (folder / "pair.out").open("w")
    outer = subprocess.Popen([*APART, "bash", str(HERE / "pair.sh"), str(folder)], stdout=log, stderr=log)
    try:
        yield _when_idle(folder, outer)
    finally:
        outer.send_signal(signal.SIGKILL)
        outer.wait()
        log.close()


def _when_idle(folder: Path, outer: subprocess.Popen[bytes]) -> Pair:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(AssertionError, IndexError):
            pair = Pair(folder=folder, inside=psutil.Process(outer.pid).children()[0].pid)
            if pair.run("sinfo", "-h", "-N", "-o", "%t").split() == ["idle", "idle"]:
                return pair
        assert outer.poll() is None, (folder / "pair.out").read_text()
        assert time.monotonic() < deadline, "\n".join(p.read_text() for p in sorted(folder.glob("*.o*")))
        time.sleep(0.2)
