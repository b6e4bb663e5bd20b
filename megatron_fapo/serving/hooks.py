"""What a group of servers asks of others: of those who started its servers and publish to them, and of its router."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from megatron_fapo.errors import ServerError
from megatron_fapo.serving.client import ServerClient


async def _nobody(client: ServerClient) -> bool:
    return False


async def _has_them(client: ServerClient) -> bool:
    return True


def _fixed(count: int) -> None:
    raise ServerError("nobody keeps these servers, so none can be added or removed")


@dataclass(slots=True, kw_only=True)
class Hooks:
    """What a group asks of those who started its servers and of those who publish to them."""

    suspect: Callable[[ServerClient], Awaitable[bool]] = _nobody
    """A request to this server broke off. Whether the server is taken for dead, and lost to the group by then."""
    diagnose: Callable[[], None] = lambda: None
    """No server is left; it may raise an error that says more (a dead server's log)."""
    catch_up: Callable[[ServerClient], Awaitable[bool]] = _has_them
    """Bring the group's present weights to a server that was started again. False: the next update brings them."""
    room: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
    """Held while a server is started again and joins the group: where devices are shared, it waits for their turn."""
    resize: Callable[[int], None] = _fixed
    """From now on so many servers are wanted: start some, or let some leave."""
    seated: Callable[[], Mapping[int, ServerClient]] = dict
    """The servers that live, by their place in the group."""
    retried: Callable[[int], None] = lambda samples: None
    """So many samples are asked again, their server having died."""
    moved: Callable[[int], None] = lambda samples: None
    """So many samples go on at another server, as `ServerGroup.moves` says."""
    restarted: Callable[[], None] = lambda: None
    """A server was started again."""


class Router(Protocol):
    """What a router is asked for: it knows the servers that may be asked, and no others."""

    client: ServerClient

    async def add(self, client: ServerClient) -> None:
        """From now on this server gets requests."""

    async def remove(self, client: ServerClient) -> None:
        """From now on it gets none."""

    async def alive(self) -> bool:
        """Whether the router answers."""
