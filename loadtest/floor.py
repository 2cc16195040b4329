"""The floor for Python: two bare uvloop protocols that hand bytes to each other, no HTTP and no check of anything."""

import argparse
import asyncio
from typing import cast

import uvloop


class Side(asyncio.Protocol):
    """One side of a relayed connection; what it hears goes to the other."""

    def __init__(self, other: "Side | None" = None) -> None:
        self.other = other
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Pass bytes on."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        """Stop hearing from the other side: this one is slower."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Hear from the other side again."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Close the other side too."""
        self.transport = None
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class ClientSide(Side):
    """An accepted connection; it gets an upstream connection of its own, and what comes before that stands waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop, upstream_port: int) -> None:
        super().__init__()
        self._loop = loop
        self._upstream_port = upstream_port
        self._early = b""
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connect to the upstream."""
        super().connection_made(transport)
        self._connecting = self._loop.create_task(self._connect(), name="floor connect")

    def data_received(self, data: bytes) -> None:
        """Pass bytes on, or keep them until there is somewhere to pass them."""
        if self.other is None:
            self._early += data
        else:
            super().data_received(data)

    async def _connect(self) -> None:
        try:
            _, upstream = await self._loop.create_connection(lambda: Side(self), "127.0.0.1", self._upstream_port)
        except OSError:
            if self.transport is not None:
                self.transport.close()
            return
        self.other = upstream
        assert upstream.transport is not None
        if self.transport is None:
            upstream.transport.close()
        elif self._early:
            early, self._early = self._early, b""
            upstream.transport.write(early)


async def serve(port: int, upstream_port: int) -> None:
    """Serve until cancelled."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: ClientSide(loop, upstream_port), "127.0.0.1", port, backlog=65_535)
    await server.serve_forever()


def main() -> None:
    """Run the relay."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.floor", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream-port", type=int, required=True)
    parsed = parser.parse_args()
    uvloop.run(serve(parsed.port, parsed.upstream_port))


if __name__ == "__main__":
    main()
