"""A server's memory as the phases of a run see it: given back, taken again, and read back each time."""

from collections.abc import Sequence
from typing import Any, Literal

from megatron_fapo.serving.client import ServerClient

Tag = Literal["weights", "kv_cache"]
TAGS: tuple[Tag, ...] = ("weights", "kv_cache")


class ServerMemory:
    """One server's weights and KV cache.

    SGLang's CUDA graphs live in a pool of their own; they go and come with the KV cache, as its authors advise. It
    refuses to resume what it has not released, so what is away is kept in mind here.
    """

    def __init__(self, client: ServerClient) -> None:
        self.client = client
        self._away: set[Tag] = set()
        self._embedded: bool | None = None

    async def give(self, tags: Sequence[Tag]) -> None:
        """Give these back, where they are not given back already. The server must be idle, and stays paused."""
        due = [tag for tag in tags if tag not in self._away]
        if not due:
            return
        await self.client.pause("retract")
        await self.client.flush_cache()
        await self.client.release_memory(await self._as_the_engine_calls_them(due))
        self._away.update(due)

    async def take(self, tags: Sequence[Tag]) -> None:
        """Take these again, where they are away; with all of its memory the server generates again."""
        due = [tag for tag in tags if tag in self._away]
        if not due:
            return
        await self.client.resume_memory(await self._as_the_engine_calls_them(due))
        self._away.difference_update(due)
        if not self._away:
            await self.client.resume_generation()

    async def held(self) -> dict[Tag, int] | None:
        """Bytes by tag, as the server counts them now; None for SGLang, which does not say."""
        memory = (await self.client.info()).get("memory")
        return None if memory is None else {tag: int(memory[tag]) for tag in TAGS}

    async def _as_the_engine_calls_them(self, tags: Sequence[Tag]) -> list[str]:
        if self._embedded is None:
            info: dict[str, Any] = await self.client.info()
            self._embedded = info.get("engine") == "embedded"
        extra = ["cuda_graph"] if "kv_cache" in tags and not self._embedded else []
        return [*tags, *extra]
