"""When keys were last used, noted in their store once a minute for all of them: no request writes anything."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Final

from edge.config.process_settings import KeysConfig
from edge.errors import Unusable
from edge.keys.authenticator import Authenticator
from edge.keys.stores.administration import Actor, ReadOnlyStore
from edge.keys.stores.table import registry_of
from edge.outage import Outage

_log = logging.getLogger(__name__)

_INTERVAL_S: Final = 60
_CLOSE_PATIENCE_S: Final = 1.0
_ACTOR: Final = Actor("edge", "serve")


class KeyUses:
    """Notes the keys of the last minute; of those that cannot be noted, the store shows an earlier use."""

    def __init__(self, authenticator: Authenticator, config: KeysConfig, wall: Callable[[], float] = time.time) -> None:
        self._authenticator = authenticator
        self._config = config
        self._wall = wall
        self.outage = Outage(_log, "the last use of keys cannot be noted", "the last use of keys is noted again")

    async def run(self) -> None:
        """Note once a minute, until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL_S)
            await self.note()

    async def close(self) -> None:
        """Note the last ones, unless that takes long."""
        if not self._authenticator.outage:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_PATIENCE_S):
                    await self.note()

    async def note(self) -> None:
        """Note the keys that were used since the last call, with the minute of now."""
        ids = self._authenticator.take_used()
        if not ids:
            return
        at = self._wall() // _INTERVAL_S * _INTERVAL_S

        def note() -> None:
            with registry_of(self._config, _ACTOR) as registry:
                registry.note_used(ids, at)

        try:
            await asyncio.to_thread(note)
        except ReadOnlyStore:  # whoever keeps the keys sees each look-up
            return
        except Unusable as error:
            self.outage.down(str(error), logging.WARNING)
        else:
            self.outage.up()
