"""Where the process listens, and what keeps it from that."""

import asyncio
import os
import socket
import stat

import pytest

from edge.errors import Unusable
from edge.process.server import Server
from edge.simulator.server import Simulator
from tests.conftest import ROUTES, RawClient, StartEdge


async def test_unix_socket_is_listened_on_and_a_left_one_replaced(start_edge: StartEdge, simulator: Simulator) -> None:
    """A process that was killed leaves its socket behind."""
    routes = ROUTES.replace("{upstream}", simulator.url)
    edge = await start_edge(routes, server='listen = ["unix:edge.sock", "127.0.0.1:0"]\n')
    path = edge.config_path.parent / "edge.sock"
    assert stat.S_ISSOCK(path.stat().st_mode)
    client = RawClient(*await asyncio.open_unix_connection(str(path)))
    client.send(edge.request({"model": "public/deepseek-r1"}))
    assert (await client.response())[0] == 200
    await edge.consistent()
    assert (await edge.log())[-1]["client"] == "unix"
    client.close()
    await edge.stop()
    with socket.socket(socket.AF_UNIX) as left:
        path.unlink(missing_ok=True)
        left.bind(str(path))
    again = Server(edge.config_path, log_to=os.open(os.devnull, os.O_WRONLY))
    ready = asyncio.Event()
    task = asyncio.get_running_loop().create_task(again.run(lambda _: ready.set()))
    await ready.wait()
    again.stop()
    await task


@pytest.mark.parametrize("which", ["listen", "admin"])
async def test_address_that_is_taken_ends_the_start_and_names_it(start_edge: StartEdge, which: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(Unusable, match=address):
            await start_edge(ROUTES.replace("{upstream}", "http://127.0.0.1:1"), server=f'{which} = "{address}"\n')
