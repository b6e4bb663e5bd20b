"""The patches of the checkpoint writer are needed still; when one of these fails after an upgrade, the patch may go."""

import inspect
import queue

import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_fapo.compat import checkpoint_files, versions
from megatron_fapo.compat.versions import MEGATRON


@pytest.mark.skipif(not MEGATRON.forks_checkpoint_writers, reason="this megatron-core writes in threads")
def test_without_p11_a_save_forks() -> None:
    upstream = inspect.getsource(inspect.getmodule(filesystem_async) or filesystem_async)
    assert 'get_context("fork")' in upstream
    assert "def write_preloaded_data_multiproc" in upstream


@pytest.mark.skipif(MEGATRON.forks_checkpoint_writers, reason="this megatron-core forks")
def test_p11_is_not_needed_where_upstream_writes_in_threads() -> None:
    upstream = inspect.getsource(filesystem_async)
    assert 'get_context("fork")' not in upstream
    assert "def write_preloaded_data_multithread" in upstream


def test_without_p13_a_save_spawns_a_manager() -> None:
    assert "ctx.Manager().Queue()" in inspect.getsource(filesystem_async)


def test_without_p14_states_behind_a_padding_are_shifted() -> None:
    source = inspect.getsource(DistributedOptimizer.sharded_param_state_fully_reshardable)
    assert "world_tensors[state_key][param_world_start:param_world_end]" in source
    assert "see issue #504" in source


def test_with_the_patches_results_travel_by_a_plain_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_get_write_results_queue" if MEGATRON.forks_checkpoint_writers else "get_write_results_queue"
    monkeypatch.setattr(filesystem_async, name, getattr(filesystem_async, name))
    if MEGATRON.forks_checkpoint_writers:
        writer = filesystem_async.FileSystemWriterAsync
        monkeypatch.setattr(writer, "write_preloaded_data_multiproc", writer.write_preloaded_data_multiproc)
    checkpoint_files.install()
    assert isinstance(getattr(filesystem_async, name)(), queue.Queue)


def test_an_unknown_megatron_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "VERSIONS", ())
    with pytest.raises(Exception, match=f"megatron-core {MEGATRON.version} is installed"):
        versions._installed()
