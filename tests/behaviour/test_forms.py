"""Forms over real sockets: what clients send arrives with its model, and what could be read twice goes nowhere."""

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import openai
import pytest
from aiohttp.base_protocol import BaseProtocol

from edge.simulator.server import Simulator
from tests.conftest import Edge, StartEdge

pytestmark = pytest.mark.usefixtures("no_environment")

PUBLIC = "public/deepseek-r1"
REWRITTEN = "deepseek-ai/深度"
REWRITING = f"""
[pools.r1]
endpoints = ["{{upstream}}"]
[routes."public/deepseek-r1"]
pool = "r1"
model = "{REWRITTEN}"
"""
TYPE = "multipart/form-data; boundary=xx"
HEAD = '--xx\r\nContent-Disposition: form-data; name="model"'
MODEL = f"{HEAD}\r\n\r\n{PUBLIC}\r\n"
FILE = (
    '--xx\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\nRIFF\r\n'
)
END = "--xx--\r\n"
FILE_NAME = 'we"ird; na\\me 会议.wav'
SOUND = b"RIFF\r\n\r\n--x\xff\x00"

Send = Callable[[Edge, Path], Awaitable[None]]


async def fields_of(simulator: Simulator) -> dict[str | None, bytes]:
    """The parts of the one form that the simulator got, as aiohttp reads it."""
    [record] = simulator.requests
    loop = asyncio.get_running_loop()
    stream = aiohttp.StreamReader(BaseProtocol(loop), 2**24, loop=loop)
    stream.feed_data(record.body)
    stream.feed_eof()
    fields = {}
    async for part in aiohttp.MultipartReader(dict(record.headers), stream):
        assert isinstance(part, aiohttp.BodyPartReader)
        assert part.name not in fields
        fields[part.name] = bytes(await part.read(decode=True))
    return fields


# --- real clients


async def by_openai(edge: Edge, file: Path) -> None:
    async with openai.AsyncOpenAI(base_url=f"{edge.url}/v1", api_key=edge.key, max_retries=0) as client:
        await client.audio.transcriptions.create(
            model=PUBLIC,
            file=(FILE_NAME, file.read_bytes(), "audio/wav"),
            chunking_strategy={"type": "server_vad", "threshold": 0.5},
            timestamp_granularities=["word"],
        )


def by_aiohttp(*, quote_fields: bool) -> Send:
    async def send(edge: Edge, file: Path) -> None:
        form = aiohttp.FormData({"model": PUBLIC}, quote_fields=quote_fields)
        form.add_field("file", file.read_bytes(), filename=FILE_NAME, content_type="audio/wav")
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {edge.key}"}) as session,
            session.post(f"{edge.url}/v1/audio/transcriptions", data=form) as response,
        ):
            assert response.status == 200

    return send


def by_curl(*options: str) -> Send:
    async def send(edge: Edge, file: Path) -> None:
        curl = shutil.which("curl")
        if curl is None:
            pytest.skip("curl is not installed")
        quoted = FILE_NAME.replace("\\", "\\\\").replace('"', '\\"')
        running = await asyncio.create_subprocess_exec(
            curl, "--silent", "--fail", "--header", f"Authorization: Bearer {edge.key}", *options,
            "--form", f"model={PUBLIC}", "--form", f'file=@{file};type=audio/wav;filename="{quoted}"',
            f"{edge.url}/v1/audio/transcriptions",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        await running.communicate()
        assert running.returncode == 0

    return send


@pytest.mark.parametrize(
    "send",
    [
        pytest.param(by_openai, id="openai"),
        pytest.param(by_aiohttp(quote_fields=True), id="aiohttp"),
        pytest.param(by_aiohttp(quote_fields=False), id="aiohttp, backslashes"),
        pytest.param(by_curl(), id="curl"),
        pytest.param(by_curl("--form-escape"), id="curl, backslashes"),
    ],
)
async def test_form_of_a_real_client_arrives_with_its_model(
    edge: Edge, simulator: Simulator, tmp_path: Path, send: Send
) -> None:
    """The name of the file has a quote, a semicolon, a backslash and letters beyond ASCII."""
    file = tmp_path / "a.wav"
    file.write_bytes(SOUND)
    await send(edge, file)
    fields = await fields_of(simulator)
    assert fields["model"] == PUBLIC.encode()
    assert SOUND in fields.values()
    await edge.consistent()


# --- plain bytes


def asking(edge: Edge, body: bytes, content_type: str = TYPE) -> bytes:
    return (
        f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {edge.key}\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


@pytest.mark.parametrize(
    "form",
    [
        FILE + MODEL + END,
        "A preamble.\r\n" + MODEL + FILE + "--xx--\r\nAn epilogue.",
        f"{HEAD}\r\nContent-Type: text/plain; charset=ISO-8859-1\r\n\r\n{PUBLIC}\r\n" + FILE + END,
        FILE + f"{HEAD}\r\nContent-Transfer-Encoding: 8bit\r\n\r\n{PUBLIC}\r\n--xx--",
        FILE.replace("RIFF", "RIFF" * 1_000_000) + MODEL + END,
    ],
    ids=["usual", "preamble and epilogue", "Latin-1", "transfer encoding", "4 MB"],
)
async def test_form_arrives_with_the_name_that_the_route_gives(
    start_edge: StartEdge, simulator: Simulator, form: str
) -> None:
    edge = await start_edge(REWRITING.replace("{upstream}", simulator.url))
    client = await edge.connect()
    client.send(asking(edge, form.encode()))
    assert (await client.response())[0] == 200
    fields = await fields_of(simulator)
    assert fields["model"] == REWRITTEN.encode()
    assert fields["file"].startswith(b"RIFF")
    await edge.consistent()


OTHER = "--xx\r\nContent-Disposition: form-data; {}\r\n\r\nu-2/secret\r\n"
INNER = 'Content-Disposition: form-data; name="model"\r\n\r\nu-2/secret\r\n'


@pytest.mark.parametrize(
    ("content_type", "form", "param"),
    [
        ("multipart/form-data; boundary=xx; charset=utf-16", MODEL + END, None),
        ('multipart/form-data; boundary="x=x"', (MODEL + END).replace("xx", "x=x"), None),
        (TYPE, MODEL + OTHER.format('name="model"') + END, "model"),
        (TYPE, MODEL + OTHER.format('name="Model[]"') + END, "model"),
        (TYPE, MODEL + OTHER.format('name="x"; name="model"') + END, None),
        (TYPE, MODEL + OTHER.format("name*=utf-8''model") + END, None),
        (TYPE, MODEL + OTHER.format('name="file"; filename="a;name=model"') + END, "file"),
        (TYPE, MODEL + OTHER.format('name="x"\r\n ; name="model"') + END, None),
        (TYPE, MODEL + OTHER.format('name="_charset_"') + END, "_charset_"),
        (TYPE, FILE.replace("RIFF", "RIFF--xx\r\n" + INNER) + MODEL + END, None),
        (TYPE, FILE.replace("RIFF", "RIFF\n--xx\n" + INNER) + MODEL + END, None),
        (TYPE, INNER + MODEL + END, None),
        (TYPE, MODEL + END + INNER, None),
        (TYPE, f"{HEAD}; filename=a\r\n\r\n{PUBLIC}\r\n" + END, "model"),
        (TYPE, f"{HEAD}\r\nContent-Type: text/plain; charset=utf-16\r\n\r\n{PUBLIC}\r\n" + END, "model"),
        (TYPE, f"{HEAD}\r\nContent-Transfer-Encoding: base64\r\n\r\n{PUBLIC}\r\n" + END, "model"),
        (TYPE, MODEL + OTHER.format('name="stream"').replace("u-2/secret", "maybe") + END, "stream"),
        (TYPE, FILE.replace("\r\n\r\n", "\r\nX: y" * 1_000_000 + "\r\n\r\n") + MODEL + END, None),
    ],
)
async def test_form_that_could_be_read_twice_goes_nowhere(
    edge: Edge, simulator: Simulator, content_type: str, form: str, param: str | None
) -> None:
    client = await edge.connect()
    client.send(asking(edge, form.encode(), content_type))
    status, _, body = await client.response()
    error = json.loads(body)["error"]
    assert (status, error["code"], error["param"]) == (400, "invalid_request_error", param)
    assert "secret" not in error["message"]
    assert list(simulator.requests) == []
    client.send(asking(edge, (MODEL + FILE + END).encode()))  # the connection is as good as before
    assert (await client.response())[0] == 200
    await edge.consistent()
