"""Where coroutines wait for each other, whatever the machine's speed."""

import asyncio


class Meeting:
    """None leaves before all are there; who waits in vain for ten seconds raises TimeoutError."""

    def __init__(self, size):
        self.size, self.num_arrived = size, 0

    async def join(self):
        self.num_arrived += 1
        await asyncio.wait_for(self._are_all_there(), 10.0)

    async def _are_all_there(self):
        while self.num_arrived < self.size:
            await asyncio.sleep(0.001)
