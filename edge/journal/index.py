"""What each key used, by day and model: the index `usage-index.db`."""

import asyncio
import logging
from pathlib import Path
from typing import Final, NamedTuple

from edge.errors import Unusable
from edge.exchange import UsageSource
from edge.journal.ends import FIRST_UNIT, Ended
from edge.journal.following import JournalIndex, Key, adding
from edge.journal.records import CRASHED

_log = logging.getLogger(__name__)

NAME: Final = "usage-index.db"
_REFRESH_S: Final = 5.0  # between two looks for what is new
_PATIENCE_S: Final = 2.0  # of who asks, for what is new; the rest goes on in its thread
_READERS: Final = 4  # at once: threads are there for others too
SUMS: Final = (
    "requests", "prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens",
    "images", "seconds", "characters", "estimated", "crashed",
)  # fmt: skip
_TAKES: Final = {unit: SUMS.index(unit) for unit in ("images", "seconds", "characters")}


class DaySums(NamedTuple):
    """What a key used of a model on a day (UTC); `sums` are in the order of `SUMS`."""

    day: str
    model: str
    sums: tuple[int, ...]


class UsageIndex(JournalIndex):
    """Answers what keys used, at any time with what stands in the index then."""

    name = NAME
    version = 1
    schema = f"""CREATE TABLE sums (
        key_id TEXT, day TEXT, model TEXT, {", ".join(f"{name} INTEGER NOT NULL" for name in SUMS)},
        PRIMARY KEY (key_id, day, model)
    ) WITHOUT ROWID"""
    add = adding("sums", 3, SUMS)
    sums = len(SUMS)

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = float("-inf")
        self._asking = asyncio.Semaphore(_READERS)

    async def sums_of(self, key_id: str, first: str, last: str) -> list[DaySums]:
        """Return what a key used from one day to another, in order, as far as it is known within two seconds."""
        loop = asyncio.get_running_loop()
        if self._refreshing is None and loop.time() - self._refreshed_at > _REFRESH_S:
            self._refreshing = loop.create_task(self._refresh(), name="usage index")
        if self._refreshing is not None:
            await asyncio.wait((self._refreshing,), timeout=_PATIENCE_S)
        async with self._asking:
            return await asyncio.to_thread(self.read, key_id, first, last)

    async def _refresh(self) -> None:
        try:
            await asyncio.to_thread(self.catch_up)
        except Unusable as error:
            _log.error("usage index: %s", error)
        finally:
            self._refreshed_at, self._refreshing = asyncio.get_running_loop().time(), None

    def read(self, key_id: str, first: str, last: str) -> list[DaySums]:
        """Return what is known of a key from one day to another."""
        with self.open() as connection:
            rows = connection.execute(
                "SELECT * FROM sums WHERE key_id = ? AND day BETWEEN ? AND ? ORDER BY day, model", (key_id, first, last)
            )
            return [DaySums(day, model, tuple(sums)) for _, day, model, *sums in rows]

    def key_of(self, file: str, ended: Ended) -> Key:
        """Return the key, the day and the model of a record."""
        return ended.key_id or "", ended.time[:10], ended.model or ""

    def count(self, sums: list[int], ended: Ended) -> None:
        """Add a record to the sums of its key, day and model."""
        sums[0] += 1
        sums[1] += ended.prompt_tokens
        sums[2] += ended.completion_tokens
        sums[3] += ended.cached_tokens
        sums[4] += ended.reasoning_tokens
        if ended.units:
            sums[_TAKES[ended.unit or FIRST_UNIT]] += ended.units
        sums[8] += ended.usage_source == UsageSource.ESTIMATED.value
        sums[9] += ended.end == CRASHED

    async def close(self) -> None:
        """Leave the rest to the next question."""
        self.stop()
        if self._refreshing is not None:
            await self._refreshing
