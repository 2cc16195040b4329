"""The line of every key: written by hand for odd files, and compared with what tomli finds in them."""

from collections.abc import Iterator

import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from edge.config.positions import KeyPath, Positions

ODD = r'''# a comment with [a.table] and "quotes"
top = 1
dotted.key . "with space" = "x" # trailing
[ a . "b/c" . 'd"e' ]
"quoted \" \u00e9 key" = 2
list = [
    1, # one ]
    [2,
     3],
    { x = 1, y.z = [4] },

    "]", '}', """
    }]
    """,
]
inline = { a = "}", "b,c" = { d = '{' }, e = [] }
text = """
[not.a.table]
key = "no" \
""" # end
tight = """"two quotes before the end"""""
raw = QQQ
[nor.this] \
QQQQ
empty = ""
date = 1979-05-27 07:32:00Z
after = 1
[[x]]
k = 1
[x.sub]
k = 2
[[x]]
k = 3
[[x.deep]]
k = 4
[[x.deep]]
[x.deep.er]
k = 5
[late.implied]
k = 6
[late]
k = 7
spread = { # over lines, since TOML 1.1
    m = 1,

    n.o = [{
        p = '}' # }
    }],
}
'''.replace("Q", "'")  # QQQ: what delimits this text here


def paths(value: object, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the path of every value that tomli found."""
    if path:
        yield path
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, element in below:
        yield from paths(element, (*path, part))


EXPECTED = {
    ("top",): 2,
    ("dotted",): 3,
    ("dotted", "key", "with space"): 3,
    ("a",): 4,
    ("a", "b/c", 'd"e'): 4,
    ("a", "b/c", 'd"e', 'quoted " é key'): 5,
    ("a", "b/c", 'd"e', "list"): 6,
    ("a", "b/c", 'd"e', "list", 0): 7,
    ("a", "b/c", 'd"e', "list", 1): 8,
    ("a", "b/c", 'd"e', "list", 1, 1): 9,
    ("a", "b/c", 'd"e', "list", 2): 10,
    ("a", "b/c", 'd"e', "list", 2, "y", "z", 0): 10,
    ("a", "b/c", 'd"e', "list", 3): 12,
    ("a", "b/c", 'd"e', "list", 5): 12,
    ("a", "b/c", 'd"e', "inline", "b,c", "d"): 16,
    ("a", "b/c", 'd"e', "inline", "e"): 16,
    ("a", "b/c", 'd"e', "text"): 17,
    ("a", "b/c", 'd"e', "tight"): 21,
    ("a", "b/c", 'd"e', "raw"): 22,
    ("a", "b/c", 'd"e', "empty"): 25,
    ("a", "b/c", 'd"e', "date"): 26,
    ("a", "b/c", 'd"e', "after"): 27,
    ("x",): 28,
    ("x", 0): 28,
    ("x", 0, "k"): 29,
    ("x", 0, "sub"): 30,
    ("x", 0, "sub", "k"): 31,
    ("x", 1): 32,
    ("x", 1, "k"): 33,
    ("x", 1, "deep"): 34,
    ("x", 1, "deep", 0, "k"): 35,
    ("x", 1, "deep", 1): 36,
    ("x", 1, "deep", 1, "er"): 37,
    ("x", 1, "deep", 1, "er", "k"): 38,
    ("late", "implied", "k"): 40,
    ("late",): 41,
    ("late", "k"): 42,
    ("late", "spread"): 43,
    ("late", "spread", "m"): 44,
    ("late", "spread", "n", "o", 0): 46,
    ("late", "spread", "n", "o", 0, "p"): 47,
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_kind_of_key_has_the_line_it_stands_on(newline: str) -> None:
    """Tables, arrays of tables, dotted and quoted keys, elements, strings over several lines (TOML 1.1.0)."""
    positions = Positions(ODD.replace("\n", newline))
    assert {path: positions.line(path) for path in EXPECTED} == EXPECTED


def test_index_knows_exactly_the_keys_that_the_reader_finds() -> None:
    """Nothing inside a string or a comment is taken for a key, and no key is missed."""
    positions = Positions(ODD)
    assert set(positions._lines) == set(paths(tomli.loads(ODD)))


def test_unknown_key_has_the_line_of_its_deepest_known_prefix() -> None:
    """A setting that is missing is reported where its table is, and in a file without it at the first line."""
    positions = Positions("\n[a.b]\nc = [\n 1,\n]\n")
    missing: dict[KeyPath, int] = {
        ("a", "b", "x"): 2,
        ("a", "b", "c", 0, "x"): 4,
        ("a", "b", "c", 7): 3,
        ("z",): 1,
        (): 1,
    }
    assert {path: positions.line(path) for path in missing} == missing


@pytest.mark.parametrize("text", ["", "\n", "# only a comment", "a = 1", "a=[]", "a={}", "[a]", "a = 1 # no newline"])
def test_smallest_texts_are_read(text: str) -> None:
    """A text may end without a newline, anywhere that TOML lets it end."""
    assert set(Positions(text)._lines) == set(paths(tomli.loads(text)))


KEYS = st.text(max_size=3).filter(lambda key: key.isprintable()) | st.sampled_from(
    ["a", "b", 'q"', "d.t", "s p", "#", ""]
)
STRINGS = st.text(alphabet="ab\"'[]{}#,=\\\n", max_size=12)
VALUES = st.recursive(
    st.integers() | st.booleans() | st.floats(allow_nan=False) | STRINGS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS, below, max_size=3),
    max_leaves=8,
)


def quoted(text: str) -> str:
    """Write a basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def written(value: object) -> str:
    """Write a value as TOML, arrays over several lines, strings in a multi-line form that can hold them."""
    match value:
        case bool():
            return str(value).lower()
        case dict():
            return "{" + ", ".join(f"{quoted(key)} = {written(below)}" for key, below in value.items()) + "}"
        case list():
            return "[ # ]\n" + "".join(f"{written(below)},\n" for below in value) + "]"
        case str() if "\n" in value and "'" not in value:
            return f"'''\n{value}'''"
        case str() if "\n" in value:
            return '"""' + value.replace("\\", "\\\\").replace('"', '\\"') + '"""'
        case str():
            return quoted(value)
    return str(value)


@given(
    st.dictionaries(KEYS, VALUES, max_size=5),
    st.dictionaries(KEYS, st.dictionaries(KEYS, VALUES, max_size=3), max_size=3),
)
def test_generated_texts_have_every_key_where_it_was_written(
    pairs: dict[str, object], tables: dict[str, dict[str, object]]
) -> None:
    """For any keys and values: the same keys as tomli, and each top-level key on the line it was written on."""
    text, lines = "", {}
    for key, value in pairs.items():
        lines[(key,)] = text.count("\n") + 1
        text += f"{quoted(key)} = {written(value)}\n"
    for key in tables.keys() - pairs.keys():
        lines[(key,)] = text.count("\n") + 1
        text += f"[{quoted(key)}]\n" + "".join(f"{quoted(k)} = {written(v)}\n" for k, v in tables[key].items())
    positions = Positions(text)
    assert set(positions._lines) == set(paths(tomli.loads(text)))
    assert {path: positions.line(path) for path in lines} == lines
