"""What users and keys used at each route, by quarters of an hour: the index `quota-index.db`.

Days and months of limits are sums of it, in any time zone, since their offsets are quarters too. It has the last
month, also of files that are deleted meanwhile.
"""

import time
from calendar import timegm
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final

from edge.journal.ends import Ended
from edge.journal.following import JournalIndex, Key, adding
from edge.journal.records import CRASHED

NAME: Final = "quota-index.db"
_QUARTER_S: Final = 900
_KEPT_S: Final = 33 * 86_400  # a month, and what clocks and time zones differ by
_SUMS: Final = ("requests", "tokens")


Used = tuple[str, str, str, int, int]  # route, user, key id, requests and tokens


class SpentIndex(JournalIndex):
    """Answers what was used in a day or a month."""

    name = NAME
    version = 1
    schema = """CREATE TABLE spent (
        quarter INTEGER, file TEXT, route TEXT, user TEXT, key_id TEXT, requests INTEGER NOT NULL,
        tokens INTEGER NOT NULL, PRIMARY KEY (quarter, file, route, user, key_id)
    ) WITHOUT ROWID"""
    add = adding("spent", 5, _SUMS)
    sums = len(_SUMS)

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        super().__init__(directory)
        self._clock = clock

    def key_of(self, file: str, ended: Ended) -> Key | None:
        """Return when, in which process's files and by whom a record was used, None for an old one."""
        quarter = _quarter_of(ended.time[:16])
        if quarter < self._oldest():
            return None
        return quarter, file.partition(".")[0], ended.route or "", ended.user or "", ended.key_id or ""

    def count(self, sums: list[int], ended: Ended) -> None:
        """Add a record to the sums of its quarter; it is no request of a limit if it has ended and asked nobody."""
        sums[0] += ended.endpoint is not None or ended.end == CRASHED
        sums[1] += ended.prompt_tokens + ended.completion_tokens

    def forget(self) -> None:
        """Drop what is older than a month."""
        with self.open() as connection:
            connection.execute("DELETE FROM spent WHERE quarter < ?", (self._oldest(),))

    def read(self, begins_at: float, ends_at: float, without: str) -> Iterator[Used]:
        """Yield what was used from one Unix time to another, but for the files of the token `without`."""
        with self.open() as connection:
            yield from connection.execute(
                "SELECT route, user, key_id, sum(requests), sum(tokens) FROM spent"
                " WHERE quarter >= ? AND quarter < ? AND file != ? GROUP BY route, user, key_id",
                (int(begins_at) // _QUARTER_S, int(ends_at) // _QUARTER_S, without),
            )

    def _oldest(self) -> int:
        return int(self._clock() - _KEPT_S) // _QUARTER_S


@lru_cache(maxsize=8)
def _quarter_of(minute: str) -> int:
    """Return the quarter of an hour of a time, in quarters since 1970; -1 for what is no time."""
    try:
        return timegm(time.strptime(minute, "%Y-%m-%dT%H:%M")) // _QUARTER_S
    except ValueError:
        return -1
