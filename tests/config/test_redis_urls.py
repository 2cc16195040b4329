"""Where a Redis is, as a URL says it; what is wrong with one is in `tests/cases/mistakes.txt`."""

import pytest

from edge.config.redis_urls import RedisUrl, names_at, parse_redis
from edge.config.values import KeyStoreAddress

SENTINELS = "rediss+sentinel://edge:p%40ss@a:1,[::1],c/my.service-1/3?sentinel_username=s&sentinel_password=s%40s"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h", RedisUrl("single", False, (("h", 6379),))),
        ("rediss://:p@H:1/2", RedisUrl("single", True, (("h", 1),), None, "p", database=2)),
        ("redis+cluster://u:p@a,b:2/0", RedisUrl("cluster", False, (("a", 6379), ("b", 2)), "u", "p")),
        (
            SENTINELS,
            RedisUrl(
                "sentinel", True, (("a", 1), ("::1", 26379), ("c", 26379)),
                "edge", "p@ss", "my.service-1", 3, "s", "s@s",
            ),
        ),
    ],
)  # fmt: skip
def test_url_says_where_and_as_whom(url: str, expected: RedisUrl) -> None:
    assert parse_redis(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://secret,/s",
        "redis+sentinel://u:secret@a:x/s",
        "redis+sentinel://u:secret@a/s/0/0",
        "redis+sentinel://u:secret@a/s?sentinel_password=secret&db=1",
        "redis+sentinel://u:secret@a/s#secret",
        "redis+sentinel://u:secret@a/secret secret",
        "redis+cluster://u:secret@/",
        "redis+cluster://u:secret@a/service",
        "redis+cluster://u:secret@a?sentinel_password=secret",
        "redis://u:secret@a/0?secret",
        "valkey://u:secret@a",
    ],
)
def test_url_that_is_none_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="write") as caught:
        parse_redis(url)
    assert "secret" not in str(caught.value)


def test_nothing_secret_is_shown() -> None:
    assert str(parse_redis(SENTINELS)) == "a:1,[::1]:26379,c:26379"
    assert str(KeyStoreAddress(url=SENTINELS)) == "rediss+sentinel://a:1,[::1],c/my.service-1/3"
    assert "ss" not in repr(parse_redis(SENTINELS))


def test_names_in_a_cluster_are_in_one_slot_and_elsewhere_as_they_were() -> None:
    names = ("edge:key:ab", 'edge:limit:["{a}"]')
    assert [*map(names_at("redis+cluster://a"), names)] == ["{edge}:key:ab", '{edge}:limit:["{a}"]']
    for url in ("redis://a", SENTINELS, ""):
        assert [*map(names_at(url), names)] == [*names]
