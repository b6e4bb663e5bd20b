"""Who is judged next: a limited number at once, the most urgent of those who wait, a limited number of them."""

import asyncio
import heapq
from itertools import count


class Full(Exception):
    """As many wait already as may."""


class Places:
    """`limit` places and a queue of at most `queue`. The lowest urgency goes first, equals in their order."""

    def __init__(self, limit: int, queue: int) -> None:
        self._free = limit
        self._queue = queue
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = count()

    async def enter(self, urgency: int) -> None:
        """Take a place, or wait for one. Raises Full."""
        if self._free > 0:
            self._free -= 1
            return
        if len(self._waiting) >= self._queue and self._drop_cancelled() >= self._queue:
            raise Full
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (urgency, next(self._order), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the place was given just now
                self.leave()
            raise

    def leave(self) -> None:
        """Give the place back."""
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _drop_cancelled(self) -> int:
        self._waiting = [entry for entry in self._waiting if not entry[2].done()]
        heapq.heapify(self._waiting)
        return len(self._waiting)
