"""What every key store promises, run over each of them with a real server behind it."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge.config.process_settings import KEY_STORES, JwtConfig, KeysConfig
from edge.config.reading import load_keys
from edge.config.values import KeyStoreAddress
from edge.errors import Unusable
from edge.exchange import Principal
from edge.keys.stores.http import HttpKeyStore
from edge.keys.stores.protocol import Invalidation, KeyStore, StoreFailed, UserState, hash_key
from edge.keys.stores.redis import RedisKeyStore
from edge.keys.stores.table import STORES, key_store
from edge.keys.tokens import TokenVerifier
from tests.keybackends import HARMS, KINDS, PATIENCE_S, REPORTING, Backend, Facts, Listener, attended, running

USER = "u-1100a15812cc"
KEY = "sk-one-0123456789"
OTHER = "sk-two-0123456789"


@pytest.mark.parametrize("scheme", STORES)
async def test_every_row_of_the_table_is_a_store_that_the_file_can_name(tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "routes.toml"
    (place,) = (each for each in KEY_STORES if scheme in each.schemes)
    path.write_text(f'[keys]\nstore = "{scheme}:{"//127.0.0.1:1/0" if place.check else "keys"}"\n')
    store = key_store(load_keys(path))
    assert type(store) is STORES[scheme]
    await store.close()


async def test_every_store_that_the_file_can_name_is_in_the_table_and_in_this_suite(tmp_path: Path) -> None:
    assert {scheme for place in KEY_STORES for scheme in place.schemes} == set(STORES)
    async with contextlib.AsyncExitStack() as stack:
        backends = [await stack.enter_async_context(running(kind, tmp_path)) for kind in KINDS]
        assert {type(backend.store()) for backend in backends} == set(STORES.values())


@dataclass
class Setting:
    """A store that is open, its owner, and the backend behind it."""

    store: KeyStore
    listener: Listener
    backend: Backend

    async def find(self, key: str) -> Principal | None:
        return await self.store.look_up(hash_key(key), key)

    async def news_of(self, key: str, facts: Facts) -> None:
        """Wait for the report of a change, where there are reports."""
        if self.backend.reports:
            principal = Principal(facts.id, facts.user)
            reports = self.listener.reports
            await self.listener.until(lambda: any(each.concerns(hash_key(key), principal) for each in reports))


@pytest.fixture(params=KINDS)
async def setting(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Setting]:
    """Give each implementation of `KeyStore` in turn."""
    async with running(request.param, tmp_path) as backend, serving(backend) as ready:
        yield ready


@contextlib.asynccontextmanager
async def serving(backend: Backend) -> AsyncIterator[Setting]:
    store = backend.store()
    async with attended(store) as listener:
        yield Setting(store, listener, backend)


async def test_known_key_yields_its_whole_record(setting: Setting) -> None:
    """A look-up returns every field of the record; expiry is passed on, for the owner to judge."""
    facts = await setting.backend.create(
        KEY, Facts("key_1", USER, "laptop", ("public/*", f"{USER}/**"), ("public/glm*",), 1060.5)
    )

    assert await setting.find(KEY) == Principal(
        id=facts.id,
        user=USER,
        name="laptop",
        allow=("public/*", f"{USER}/**"),
        deny=("public/glm*",),
        expires_at=1060.5,
    )


async def test_unknown_key_is_none(setting: Setting) -> None:
    """None says that the store was asked and knows no such key."""
    await setting.backend.create(KEY, Facts("key_1", USER))

    assert await setting.find("sk-of-nobody") is None


async def test_new_key_is_known_and_reported(setting: Setting) -> None:
    """A negative answer that is kept must die at once when its key comes to be."""
    assert await setting.find(KEY) is None
    facts = await setting.backend.create(KEY, Facts("key_1", USER))

    await setting.news_of(KEY, facts)

    assert await setting.find(KEY) is not None


async def test_revoked_key_is_unknown_and_reported(setting: Setting) -> None:
    """Revocation reaches a running process by the report, and every look-up after it."""
    facts = await setting.backend.create(KEY, Facts("key_1", USER))
    await setting.news_of(KEY, facts)

    await setting.backend.revoke(facts)
    await setting.news_of(KEY, facts)

    assert await setting.find(KEY) is None


async def test_disabled_key_is_known_as_such_and_reported(setting: Setting) -> None:
    """A disabled key is known, so that its owner can be told apart from a stranger."""
    facts = await setting.backend.create(KEY, Facts("key_1", USER))
    await setting.news_of(KEY, facts)

    await setting.backend.disable(facts)
    await setting.news_of(KEY, facts)

    found = await setting.find(KEY)
    assert found is not None
    assert not found.enabled


async def test_what_is_said_of_a_user_holds_for_each_of_the_keys_and_is_reported(setting: Setting) -> None:
    """For those that are made later too, for nobody else's, and it can be taken back."""
    first = await setting.backend.create(KEY, Facts("key_1", USER))
    await setting.backend.create(OTHER, Facts("key_2", "u-other"))
    await setting.news_of(KEY, first)

    await setting.backend.mark_user(USER, suspended=True)
    await setting.news_of(KEY, first)
    await setting.backend.create("sk-three-01234567", Facts("key_3", USER))
    found = [await setting.find(key) for key in (KEY, OTHER, "sk-three-01234567")]
    assert [(each.suspended, each.out_of_quota) for each in found if each] == [
        (True, False), (False, False), (True, False),
    ]  # fmt: skip

    await setting.backend.mark_user(USER, out_of_quota=True)
    await setting.news_of(KEY, first)
    again = await setting.find(KEY)
    assert again is not None
    assert (again.suspended, again.out_of_quota) == (False, True)


async def test_user_is_known_without_a_key(setting: Setting) -> None:
    """For who shows a token; a server that is asked by introspection has no such question, and says nothing."""
    await setting.backend.mark_user(USER, suspended=True)
    expected = UserState(suspended=True) if setting.backend.reports else UserState()

    assert await setting.store.look_up_user(USER) == expected
    assert await setting.store.look_up_user("u-nobody") == UserState()


async def test_reports_come_on_the_event_loop(setting: Setting) -> None:
    """The owner's cache has no locks: the hook runs where the cache runs."""
    if not setting.backend.reports:
        pytest.skip("this store reports nothing")
    loops: asyncio.Queue[asyncio.AbstractEventLoop] = asyncio.Queue()
    await setting.store.close()
    setting.store.on_change = lambda changes: loops.put_nowait(asyncio.get_running_loop())
    await setting.store.open()

    await setting.backend.create(KEY, Facts("key_1", USER))

    assert await loops.get() is asyncio.get_running_loop()


async def test_abandoned_look_up_disturbs_nobody(setting: Setting) -> None:
    """A client that leaves cancels its look-up; the store goes on."""
    await setting.backend.create(KEY, Facts("key_1", USER))
    async with asyncio.TaskGroup() as group:
        abandoned = group.create_task(setting.find(KEY))
        await asyncio.sleep(0)  # the task runs to its await
        abandoned.cancel()

    assert await setting.find(KEY) is not None


async def test_look_up_that_is_given_up_leaves_its_answer_to_nobody(setting: Setting) -> None:
    """Wherever it was, connections that are shared must not hand one caller's answer to the next."""
    for number in range(20):
        await setting.backend.create(f"sk-mine-{number:08}", Facts(f"key_{number}", f"u-{number}"))
    for number in range(20):
        async with asyncio.TaskGroup() as group:
            left = [group.create_task(setting.find(f"sk-mine-{each:08}")) for each in range(20)]
            for _ in range(number):
                await asyncio.sleep(0)
            for each in left:
                each.cancel()
        assert await setting.find("sk-of-nobody") is None
        found = await setting.find(f"sk-mine-{number:08}")
        assert found is not None
        assert found.user == f"u-{number}"


async def test_many_at_once_get_each_their_own_answer(setting: Setting) -> None:
    """No answer goes to who asked something else."""
    made = [await setting.backend.create(f"sk-many-{n:08}", Facts(f"key_{n}", f"u-{n}")) for n in range(40)]

    found = await asyncio.gather(*(setting.find(f"sk-many-{n:08}") for n in range(80)))

    assert [each and each.id for each in found] == [*(facts.id for facts in made), *[None] * 40]


async def test_closed_store_is_unavailable(setting: Setting) -> None:
    """A store that is closed knows nothing, which is not the same as an unknown key."""
    await setting.store.close()
    await setting.store.close()

    with pytest.raises(StoreFailed):
        await setting.find("sk-any-01234567")


@pytest.mark.parametrize(("kind", "how"), HARMS)
async def test_broken_store_is_unavailable_and_never_says_unknown(kind: str, how: str, tmp_path: Path) -> None:
    """Whatever is wrong with it, the answer is that nobody can tell; and it needs no restart when it is mended."""
    async with running(kind, tmp_path) as backend:
        await backend.create(KEY, Facts("key_1", USER))
        async with serving(backend) as setting:
            assert await setting.find(KEY) is not None
            await backend.harm(how)
            for _ in range(3):
                with pytest.raises((StoreFailed, TimeoutError)) as failure:
                    async with asyncio.timeout(1):
                        await setting.find(KEY)
                if how != "slow":
                    assert isinstance(failure.value, StoreFailed)
                    assert failure.value.reason, "the log has nothing to say"
                    told = str(failure.value) + failure.value.reason
                    assert KEY not in told
                    assert hash_key(KEY).hex() not in told
            await backend.mend()
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    with contextlib.suppress(StoreFailed):
                        assert await setting.find(KEY) is not None
                        break
                    await asyncio.sleep(0.01)


@pytest.mark.parametrize("kind", REPORTING)
async def test_store_that_hears_of_changes_reports_everything_when_it_is_back(kind: str, tmp_path: Path) -> None:
    """What was changed while it was down was heard by nobody. The outage is told once on each side."""
    async with running(kind, tmp_path) as backend:
        await backend.create(KEY, Facts("key_1", USER))
        async with serving(backend) as setting:
            await setting.find(KEY)
            await backend.harm("dead")
            listener = setting.listener
            await listener.until(lambda: any(listener.outages))
            await backend.mend()
            await listener.until(lambda: not listener.outages[-1] and any(each.everything for each in listener.reports))


@pytest.mark.parametrize(
    ("changes", "principal", "concerned"),
    [
        (Invalidation(frozenset((b"d",))), None, True),
        (Invalidation(frozenset((b"e",))), None, False),
        (Invalidation(everything=True), None, True),
        (Invalidation(ids=frozenset(("key_1",))), None, True),
        (Invalidation(ids=frozenset(("key_1",))), Principal("key_1", USER), True),
        (Invalidation(ids=frozenset(("key_2",))), Principal("key_1", USER), False),
        (Invalidation(users=frozenset((USER,))), Principal("key_1", USER), True),
        (Invalidation(users=frozenset(("u-other",))), Principal("key_1", USER), False),
        (Invalidation(users=frozenset(("u-other",))), None, True),
    ],
)
def test_a_change_concerns_what_it_names_and_what_nobody_knows_yet(
    changes: Invalidation, principal: Principal | None, concerned: bool
) -> None:
    assert changes.concerns(b"d", principal) is concerned


def test_changes_are_joined() -> None:
    one, other = Invalidation(frozenset((b"d",)), frozenset(("key_1",))), Invalidation(users=frozenset((USER,)))
    both = Invalidation.all_of((one, other, Invalidation(everything=True)))
    assert both == Invalidation(frozenset((b"d",)), frozenset(("key_1",)), frozenset((USER,)), everything=True)


def test_digest_is_the_raw_sha256() -> None:
    """32 bytes, the same for text and bytes (FIPS 180-4, the vector "abc")."""
    expected = bytes.fromhex("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")

    assert hash_key("abc") == hash_key(b"abc") == expected


def test_header_value_that_is_no_utf8_is_hashed_as_it_came() -> None:
    """HTTP servers hand over such bytes as surrogates; an error here would quote a credential."""
    assert hash_key(b"\xff\xfe".decode("utf-8", "surrogateescape")) == hash_key(b"\xff\xfe")


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("https", None),
        ("rediss", b""),
        ("jwt", b"-----BEGIN CERTIFICATE-----\nxx\n-----END CERTIFICATE-----\n"),
    ],
)
async def test_file_without_a_certificate_is_named_at_the_start(
    tmp_path: Path, kind: str, content: bytes | None
) -> None:
    """OpenSSL's own words name neither the file nor the setting."""
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    config = KeysConfig(KeyStoreAddress(url=f"{kind}://127.0.0.1:1/0"), store_ca_file=path)
    opened: HttpKeyStore | RedisKeyStore | TokenVerifier
    match kind:
        case "https":
            opened = HttpKeyStore(config)
        case "rediss":
            opened = RedisKeyStore(config)
        case _:
            jwt = JwtConfig("https://console.example/", "models", "https://127.0.0.1:1/jwks", ca_file=path)
            opened = TokenVerifier(jwt, lambda: 0.0)
    setting = "jwt.ca_file" if kind == "jwt" else "keys.store_ca_file"
    with pytest.raises(Unusable, match=rf"^{re.escape(setting)}: {re.escape(str(path))} cannot be used .*PEM"):
        await opened.open()
