"""The key that a request shows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from edge.errors import InvalidRequest, Unauthenticated
from edge.exchange import Credential
from edge.keys.credential import credential_of
from edge.keys.stores.protocol import hash_key

KEY = "sk-" + "k" * 45
OTHER_KEY = "sk-" + "o" * 45


@pytest.mark.parametrize(
    "headers",
    [
        [("Authorization", f"Bearer {KEY}")],
        [("authorization", f"bearer {KEY}")],
        [("Authorization", f"BEARER   {KEY}  ")],
        [("api-key", KEY)],
        [("X-API-Key", f" {KEY} ")],
        [("Authorization", f"Bearer {KEY}"), ("api-key", KEY), ("x-api-key", KEY)],
        [("Authorization", f"Bearer {KEY}"), ("Authorization", f"bearer {KEY}")],
        [("Authorization", "Basic dTpw"), ("api-key", KEY)],
        [("Authorization", f"Bearer {KEY}"), ("api-key", "")],
        [("Authorization", f"Bearer {KEY}"), ("api-key", OTHER_KEY)],  # a vendor's key of an agent's own
        [("Authorization", f"Bearer {KEY}"), ("x-api-key", OTHER_KEY)],
    ],
)
def test_key_is_found_in_every_place_where_clients_put_it(headers: list[tuple[str, str]]) -> None:
    assert credential_of(CIMultiDict(headers))[1:] == (KEY, hash_key(KEY))


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "")],
        [("Authorization", "Bearer")],
        [("Authorization", "Bearer ")],
        [("Authorization", KEY)],
        [("Authorization", f"Basic {KEY}")],
        [("Authorization", f"Bearer{KEY}")],
        [("Authorization", "Bearer short")],
        [("Authorization", "Bearer " + "k" * 8193)],
        [("Authorization", f"Bearer {KEY} {KEY}")],
        [("Authorization", f"Bearer {KEY}\t1")],
        [("Authorization", f"Bearer {KEY}ü")],
        [("Authorization", f"Bearer {KEY}\udcff")],
        [("Authorization", f"Bearer {KEY}\x00")],
        [("Cookie", f"api-key={KEY}")],
    ],
)
def test_no_key_or_a_malformed_one_is_401_with_a_challenge(headers: list[tuple[str, str]]) -> None:
    """RFC 6750 section 3; RFC 9110 section 11.6.1: a 401 has WWW-Authenticate."""
    with pytest.raises(Unauthenticated) as caught:
        credential_of(CIMultiDict(headers))
    assert dict(caught.value.headers)["WWW-Authenticate"].startswith("Bearer ")
    assert KEY not in caught.value.message


@pytest.mark.parametrize("value", ["", KEY, f"Basic {KEY}", "Bearer", f"Bearer{KEY}"])
def test_who_forgets_the_scheme_is_told_how_a_key_is_sent_not_that_it_is_wrong(value: str) -> None:
    with pytest.raises(Unauthenticated, match="Authorization: Bearer YOUR_KEY"):
        credential_of(CIMultiDict({"Authorization": value}))


@pytest.mark.parametrize(
    "headers",
    [
        [("api-key", KEY), ("x-api-key", OTHER_KEY)],
        [("api-key", KEY), ("api-key", OTHER_KEY)],
        [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {OTHER_KEY}")],
    ],
)
def test_two_different_keys_are_400(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        credential_of(CIMultiDict(headers))
    assert KEY not in caught.value.message


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=8, max_size=512))
def test_any_visible_ascii_of_8_to_512_bytes_is_a_key(key: str) -> None:
    assert credential_of(CIMultiDict({"Authorization": f"Bearer {key}"})).key == key


def test_what_the_connection_showed_before_is_not_hashed_again() -> None:
    """The same object comes back for the same header, and for no other."""
    headers = CIMultiDict({"Authorization": f"Bearer {KEY}"})
    known = credential_of(headers)
    assert credential_of(CIMultiDict(headers), known) is known
    assert credential_of(CIMultiDict({"Authorization": f"Bearer {OTHER_KEY}"}), known).key == OTHER_KEY
    assert credential_of(CIMultiDict({"api-key": OTHER_KEY}), known).key == OTHER_KEY
    by_other_name = credential_of(CIMultiDict({"api-key": KEY}))
    with pytest.raises(Unauthenticated):
        credential_of(CIMultiDict(), by_other_name)
    with pytest.raises(Unauthenticated):
        credential_of(CIMultiDict({"Authorization": ""}), by_other_name)
    by_other_name = credential_of(CIMultiDict({"Authorization": "Basic dTpw", "api-key": KEY}))
    assert (
        credential_of(CIMultiDict({"Authorization": "Basic dTpw", "api-key": OTHER_KEY}), by_other_name).key
        == OTHER_KEY
    )


def test_credential_shows_nothing_of_itself() -> None:
    shown = repr(Credential(f"Bearer {KEY}", KEY, hash_key(KEY)))
    assert KEY not in shown
    assert repr(hash_key(KEY))[2:-1] not in shown
