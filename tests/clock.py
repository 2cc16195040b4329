"""Time that passes when a test says so."""

import asyncio


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time is told."""

    passed_s = 0.0

    def time(self) -> float:
        return self.passed_s

    async def pass_time(self, seconds: float) -> None:
        for _ in range(int(seconds * 4)):
            self.passed_s += 0.25
            await asyncio.sleep(0)
        await asyncio.sleep(0)
