"""The API of keys through a client that openapi-python-client generates from its document. By hand: it installs that.

`python tests/clients/key_api.py [VENV]`; exit 0 when the document is valid and every endpoint answers as it says.
"""

import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TOKEN = "generated-client-0123456789"
CONFIG = """
[server]
listen = "127.0.0.1:0"
admin = "unix:admin.sock"
admin_token = "{token}"
[pools.p]
endpoints = ["http://127.0.0.1:1"]
[routes."public/m"]
pool = "p"
"""
DRIVE = """
import sys
import httpx
from made import AuthenticatedClient
from made.api.default import (
    change_key, change_user, create_key, get_key, get_key_usage, get_user, list_keys, revoke_key, rotate_key,
)
from made.models import CreatedKey, Error, Key, KeyChange, KeyPage, KeyUsage, NewKey, Rotation, User, UserChange

client = AuthenticatedClient(base_url="http://edge", token=sys.argv[2])
client.set_httpx_client(httpx.Client(
    base_url="http://edge", transport=httpx.HTTPTransport(uds=sys.argv[1]),
    headers={"Authorization": f"Bearer {sys.argv[2]}"},
))
made = create_key.sync(client=client, body=NewKey(user="u-a", name="one"), idempotency_key="once")
assert isinstance(made, CreatedKey) and made.key.startswith("sk-"), made
assert create_key.sync(client=client, body=NewKey(user="u-a", name="one"), idempotency_key="once").key == made.key
assert isinstance(create_key.sync(client=client, body=NewKey(user="u-a"), idempotency_key="once"), Error)
new = rotate_key.sync(made.id, client=client, body=Rotation(grace="1h"))
assert isinstance(new, CreatedKey), new
assert get_key.sync(made.id, client=client).replaced_by == new.id
changed = change_key.sync(new.id, client=client, body=KeyChange(name="two", expires_at=None))
assert isinstance(changed, Key) and changed.name == "two", changed
page = list_keys.sync(client=client, user="u-a", limit=1)
assert isinstance(page, KeyPage) and page.has_more and page.data[0].id == made.id, page
assert isinstance(get_key_usage.sync(new.id, client=client), KeyUsage)
user = change_user.sync("u-a", client=client, body=UserChange(suspended=True))
assert isinstance(user, User) and user.suspended and get_user.sync("u-a", client=client).keys == 2
assert revoke_key.sync_detailed(new.id, client=client).status_code == 204
assert isinstance(get_key.sync("key_000000000000", client=client), Error)
print("every endpoint answers as its document says")
"""


def main(place: Path, directory: Path) -> int:
    tools = place / "bin"
    if not (tools / "openapi-python-client").exists():
        venv.create(place, with_pip=True)
        packages = ["openapi-python-client", "openapi-spec-validator", "httpx", "ruff"]
        subprocess.run([tools / "pip", "install", "-q", *packages], check=True)
    (directory / "routes.toml").write_text(CONFIG.format(token=TOKEN))
    log = (directory / "edge.log").open("wb")
    command = [sys.executable, "-m", "edge", "serve"]
    edge = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log, env={"PYTHONPATH": str(ROOT)})
    try:
        document = directory / "openapi.json"
        code = "from edge.process.api.openapi import document; import sys; sys.stdout.buffer.write(document())"
        made = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
        document.write_bytes(made.stdout)
        subprocess.run([tools / "openapi-spec-validator", document], check=True)
        generate = [tools / "openapi-python-client", "generate", "--path", document, "--meta", "none"]
        subprocess.run([*generate, "--output-path", directory / "made"], check=True, stdout=subprocess.DEVNULL)
        while not (directory / "admin.sock").exists():
            assert edge.poll() is None, (directory / "edge.log").read_text()
            time.sleep(0.1)
        drive = [tools / "python", "-c", DRIVE, directory / "admin.sock", TOKEN]
        return subprocess.run(drive, cwd=directory, check=False).returncode
    finally:
        edge.terminate()
        edge.wait()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="key-api-") as name:
        sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(name) / "venv", Path(name)))
