"""What tests of servers wait for."""

import asyncio
import time


async def collect(generator, request):
    return [sample async for sample in generator.generate(request)]


async def until(condition, seconds=10.0):
    """Wait for something to come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.02)
