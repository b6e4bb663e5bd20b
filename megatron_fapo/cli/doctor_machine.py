"""What `fapo doctor` says of the machine: memory, disks, limits, ports, the network, and what earlier runs left."""

import ipaddress
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from megatron_fapo.cli.finding import Finding
from megatron_fapo.weights import shared_memory_folder

GIGABYTE = 2**30
ENOUGH_MEMORY = 2 * GIGABYTE
"""Of the clock example."""
ENOUGH_DISK = 5 * GIGABYTE
"""For logs, rollouts and the checkpoints of a small model."""
ENOUGH_TEMPORARY = 1 * GIGABYTE
"""For Ray's session and, on a CPU, what is moved out of memory between phases."""
BUCKETS = 2
"""Buckets of weights that exist at a time."""
ENOUGH_FILES, ENOUGH_PROCESSES = 1024, 4096
FILES_ON_GPUS = 65535
"""What Ray and NCCL of a whole node open."""
RAYS = ("raylet", "gcs_server")


def machine(run: Path, bucket: int, gpus: int) -> Iterator[Finding]:
    """Everything but ports. `run` is where run folders go, `bucket` the bytes of a published bucket."""
    yield _memory()
    yield _shared_memory(BUCKETS * bucket)
    yield _disk("disk of runs", run, ENOUGH_DISK, "a checkpoint has 14 bytes a parameter: --run names another")
    yield _disk("temporary files", Path(tempfile.gettempdir()), ENOUGH_TEMPORARY, "set TMPDIR to a larger disk")
    yield from _limits(gpus)
    yield _ray()
    yield _network()


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():  # a container's own limit
        used = int(limit.with_name("memory.current").read_text())
        statistics = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
        free = min(free, int(text) - used + int(statistics["inactive_file"]))
    short = "the clock example needs about 1.5 GB: end other programs" if free < ENOUGH_MEMORY else ""
    return Finding.of("memory", f"{free / GIGABYTE:.1f} GB free", warning=short)


def _shared_memory(needed: int) -> Finding:
    folder = shared_memory_folder()
    free = shutil.disk_usage(folder).free
    advice = ""
    if free < needed:
        advice = (
            f"two buckets of weights need {needed / GIGABYTE:.1f} GB: make it larger (containers: --shm-size), or "
            "publish.bucket_megabytes smaller"
        )
    elif folder != Path("/dev/shm"):
        advice = "/dev/shm is missing or not writable: weights go through a disk folder (containers: --shm-size)"
    return Finding.of("shared memory", f"{folder}, {free / GIGABYTE:.1f} GB free", warning=advice)


def _disk(what: str, folder: Path, needed: float, advice: str) -> Finding:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{existing}, {free / GIGABYTE:.1f} GB free"
    if not os.access(existing, os.W_OK):
        return Finding.of(what, f"{existing}, not writable", error=advice)
    short = f"at least {needed / GIGABYTE:g} GB are wanted: {advice}"
    return Finding.of(what, found, warning=short if free < needed else "")


def _limits(gpus: int) -> Iterator[Finding]:
    files = FILES_ON_GPUS if gpus else ENOUGH_FILES
    yield _limit("open files", resource.RLIMIT_NOFILE, files, f"ulimit -n {files} or more")
    yield _limit("processes", resource.RLIMIT_NPROC, ENOUGH_PROCESSES, f"ulimit -u {ENOUGH_PROCESSES} or more")
    if gpus:
        yield _limit(
            "locked memory",
            resource.RLIMIT_MEMLOCK,
            resource.RLIM_INFINITY,
            "ulimit -l unlimited: InfiniBand and pinned host memory want it (containers: --ulimit memlock=-1)",
        )


def _limit(what: str, kind: int, needed: int, advice: str) -> Finding:
    soft, hard = resource.getrlimit(kind)
    endless = resource.RLIM_INFINITY
    short = soft != endless and (needed == endless or soft < needed)
    capped = hard != endless and (needed == endless or hard < needed)
    beyond = f"; the hard limit is {hard}, which an administrator raises" if capped else ""
    return Finding.of(what, "unlimited" if soft == endless else str(soft), warning=advice + beyond if short else "")


def _ray() -> Finding:
    running = sorted({f"{p.info['name']} {p.pid}" for p in psutil.process_iter(["name"]) if p.info["name"] in RAYS})
    return Finding.of(
        "other Rays",
        ", ".join(running) or "none",
        warning="another run's, or left by one; a run starts its own beside it (`ray stop` ends all, live ones too)"
        if running
        else "",
    )


def _network() -> Finding:
    """Runs on several nodes meet at the address that a node's name stands for."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return Finding.of("network", f"{name}: {error.strerror}", warning="several nodes: fapo submit --interface NAME")
    alone = ipaddress.ip_address(address).is_loopback
    advice = "only this machine is there; for several nodes: fapo submit --interface NAME"
    return Finding.of("network", f"{name} is {address}" + (f" ({advice})" if alone else ""))


def port(number: int) -> Finding:
    """Whether a port can be had; 0 is any."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            return Finding.of(f"port {number}", str(error.strerror), error="choose another port")
    if number == 0:
        return Finding.of("loopback ports", "free")
    ranges = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first, last = map(int, ranges.read_text().split()) if ranges.is_file() else (0, -1)
    advice = f"the system gives ports {first}-{last} to anybody: choose one below, or 0"
    return Finding.of(f"port {number}", "free", warning=advice if first <= number <= last else "")
