"""Ray for the length of a run.

Ray's ports listen on all interfaces, so its token mode is on; the token is a 0600 file in the run folder, never in
the home directory. Ray's own files go to a short temporary folder (Unix socket paths are limited) that is removed
at the end.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_fapo.config import ClusterSettings

# Ray reads these when it is imported, so whoever needs Ray takes it from here.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_enable_metrics_collection", "false")

import ray as ray

OBJECT_STORE_BYTES = 200 * 2**20
"""For a Ray that we start: it only carries batches and reports."""


@contextmanager
def ray_session(settings: ClusterSettings, ranks: int, folder: Path) -> Iterator[None]:
    """Connect to Ray, or start one for this run; both are undone at the end.

    Install signal handlers inside of it: `ray.init` replaces those of SIGTERM.
    """
    temporary = None
    if settings.ray_address is None:
        token = folder / "ray-token"
        token.unlink(missing_ok=True)
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        temporary = tempfile.mkdtemp(prefix="fapo-ray-")
    try:
        if temporary is None:
            ray.init(address=settings.ray_address, log_to_driver=False, logging_level="warning")
        else:
            ray.init(
                num_cpus=ranks,
                num_gpus=0,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="warning",
                _temp_dir=temporary,
                _node_ip_address="127.0.0.1",
            )
        yield
    finally:
        ray.shutdown()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
