"""What the owner of a key may call."""

import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import ModelNotFound, PermissionDenied
from edge.exchange import Principal
from edge.keys.caller import Caller
from edge.names import Glob

ME = "u-1100a15812cc"


def caller(allow: tuple[str, ...] = (), deny: tuple[str, ...] = (), user: str = ME) -> Caller:
    return Caller(Principal("key_1", user, allow=allow, deny=deny))


OWN, OTHERS = f"{ME}/qwen2", "u-2200b/qwen2"


@pytest.mark.parametrize(
    ("allow", "deny", "model", "verdict"),
    [
        # no allow: every public name and the user's own
        ((), (), "public/deepseek-r1", True),
        ((), (), "public/a/b", True),
        ((), (), OWN, True),
        ((), (), f"{ME}/a/b", True),
        ((), (), OTHERS, False),
        ((), (), "other/name", False),
        ((), (), "public", False),
        ((), (), "publicx/a", False),
        ((), (), f"{ME}x/a", False),
        ((), (), "u-2200b", False),
        # allow replaces the default
        (("public/deepseek-*",), (), "public/deepseek-r1", True),
        (("public/deepseek-*",), (), "public/qwen", False),
        (("public/*",), (), OWN, False),
        (("public/a",), (), "public/a", True),
        (("public/a",), (), "public/ab", False),
        (("public/a",), (), "xpublic/a", False),
        (("other/*",), (), "other/name", True),
        (("public/*",), (), "public/a/b", False),
        (("public/**",), (), "public/a/b", True),
        (("**",), (), "public/a/b", True),
        (("*",), (), "public/a", False),
        (("*",), (), "plain", True),
        (("*/*",), (), "public/a", True),
        (("nothing", "public/a"), (), "public/a", True),
        # an instance opens to its owner, or where the owner is written out
        (("**",), (), OTHERS, False),
        (("*/*",), (), OTHERS, False),
        (("u-*/**",), (), OTHERS, False),
        (("u-*/qwen2",), (), OTHERS, False),
        (("u-2200*/qwen2",), (), OTHERS, False),
        (("u-2200b*/qwen2",), (), OTHERS, False),
        (("u-2200b**",), (), OTHERS, False),
        (("u-2200b/*",), (), OTHERS, True),
        (("u-2200b/**",), (), OTHERS, True),
        (("u-2200b/qwen2",), (), OTHERS, True),
        (("u-2200b/qwen3",), (), OTHERS, False),
        (("**", "u-2200b/*"), (), OTHERS, True),
        (("**",), (), "u-2200b", False),
        (("*",), (), "u-2200b", False),
        (("**",), (), OWN, True),
        (("*/*",), (), OWN, True),
        (("u-*/*",), (), OWN, True),
        ((f"{ME}/*",), (), OWN, True),
        ((f"{ME}/other",), (), OWN, False),
        # deny wins
        ((), ("public/deepseek-r1",), "public/deepseek-r1", None),
        ((), ("public/deepseek-r1",), "public/deepseek-v3", True),
        (("public/a",), ("public/a",), "public/a", None),
        ((), (f"{ME}/*",), OWN, None),
        ((), ("**",), OTHERS, None),
        ((), ("*",), "public/a", True),
        (("public/*",), ("**/secret",), "public/secret", None),
    ],
)
def test_what_a_key_may_call(allow: tuple[str, ...], deny: tuple[str, ...], model: str, verdict: bool | None) -> None:
    """True, False (looks like an unknown model), None for an explicit deny."""
    who = caller(allow, deny)
    assert who.may_call(model) is verdict
    assert who.may_call(model) is verdict  # from what was remembered


@given(
    st.lists(st.text("u-ab*/", min_size=1, max_size=8).filter(lambda pattern: "***" not in pattern), max_size=4),
    st.sampled_from(["u-b/a", "u-b/b", "u-b/a/b", "u-ab/a"]),
)
def test_no_pattern_opens_anothers_instance_without_naming_the_owner(patterns: list[str], model: str) -> None:
    owner = model.partition("/")[0]
    if caller(tuple(patterns), user="u-a").may_call(model):
        assert any(pattern.partition("/")[0] == owner for pattern in patterns)


def test_deny_is_403_and_everything_else_looks_like_an_unknown_model() -> None:
    who = caller(deny=("public/a",))
    who.check("public/b")
    with pytest.raises(PermissionDenied):
        who.check("public/a")
    with pytest.raises(ModelNotFound, match=f"`{OTHERS}` does not exist or you do not have access"):
        who.check(OTHERS)


def test_what_is_remembered_of_a_key_is_bounded() -> None:
    who = caller()
    for number in range(10_000):
        assert who.may_call(f"public/m{number}")
    names = [f"public/{number}" + "\N{CJK UNIFIED IDEOGRAPH-6A21}" * 500 for number in range(300)]
    for name in (*(f"public/x{'y' * (number % 200)}{number}" for number in range(3000)), *names):
        who.may_call(name)
        assert sum(map(sys.getsizeof, who._verdicts)) <= 2048
    assert who._verdicts  # no name that is too long drives the others out


def test_keys_of_equal_patterns_share_what_is_compiled_of_them() -> None:
    """A hundred thousand keys have a handful of patterns."""
    one, other = caller(("public/*", "u-2200b/*"), ("public/secret",)), caller(("public/*",), ("public/secret",))
    assert one._allow[0][1] is other._allow[0][1]
    assert one._deny[0] is other._deny[0]


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("*", ["", "a", "a.b"], ["a/b", "/"]),
        ("**", ["", "a", "a/b", "/", "a\nb"], []),
        ("a*c", ["ac", "abc"], ["a/c", "abcd"]),
        ("a**c", ["ac", "a/b/c"], ["ab"]),
        ("a/*/c", ["a/b/c", "a//c"], ["a/c", "a/b/b/c"]),
        ("a.c", ["a.c"], ["abc"]),
        ("a+(b|c)[d]$", ["a+(b|c)[d]$"], ["aab"]),
        ("a", ["a"], ["A", "a ", "a\n", "ab", ""]),
    ],
)
def test_glob(pattern: str, matching: list[str], other: list[str]) -> None:
    """`*` stays within one level of a name, `**` crosses; nothing else has a meaning."""
    assert [text for text in (*matching, *other) if Glob(pattern).matches(text)] == matching


@given(st.text("ab/*.\n", max_size=8), st.text("ab/*.\n", max_size=8))
def test_glob_matches_what_its_regular_expression_would(pattern: str, name: str) -> None:
    """Short ones, where the expression's backtracking does not matter."""
    parts = re.split(r"(\*\*|\*)", pattern)
    expression = "".join({"**": ".*", "*": "[^/]*"}.get(part, re.escape(part)) for part in parts)
    assert Glob(pattern).matches(name) == bool(re.fullmatch(expression, name, re.DOTALL))


@pytest.mark.parametrize("pattern", ["public/" + "*a" * 200 + "*b", "**a" * 200 + "b", "**/*" * 100 + "b"])
def test_no_pattern_of_a_key_holds_up_the_process(pattern: str) -> None:
    """They come from users; a backtracking matcher would not end before the universe does."""
    name = "public/" + "a" * 500
    assert caller(allow=(pattern,)).may_call(name) is False
    assert caller(deny=(pattern,)).may_call(name) is True
    assert caller(deny=(pattern,)).may_call(name + "b") is (True if "**/*" in pattern else None)
