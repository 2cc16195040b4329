"""Numbers and truth as engines read them: what pydantic takes for one is one here."""

import json

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.envelope.lax import is_true, whole_number


class Asked(pydantic.BaseModel):
    """How vLLM 0.32.0 and SGLang 0.5.23 declare a number and a flag."""

    number: int | None = None
    flag: bool | None = None


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (b"256", 256), (b"1e3", 1000), (b"1E3", 1000), (b"2.0", 2), (b"10e-1", 1), (b"true", 1), (b'"5"', 5),
        (b'" 5\\n"', 5), (b'"+5"', 5), (b'"05"', 5), (b'"5.00"', 5), (b'"1_000"', 1000), (b'"\\u0035"', 5),
        (b'"\\u00a05"', 5),
        (b"2.7", 2),  # to llama.cpp
        (b"0", None), (b"-0", None), (b"-1", None), (b"0.5", None), (b"false", None), (b"null", None), (b"[5]", None),
        (b'{"a":5}', None), (b'""', None), (b'"-5"', None), (b'"5."', None), (b'"1e3"', None), (b'"1__0"', None),
        (b'"0x10"', None), (b'"\\u0665"', None), (b'"\\ud800"', None), (b"1e400", None), (b"9" * 5000, None),
        (b'"%b"' % (b"9" * 5000), None), (b"1" + b"0" * 15, None), (b"1e15", None),
    ],
)  # fmt: skip
def test_number_is_what_engines_make_of_it(value: bytes, number: int | None) -> None:
    assert whole_number(msgspec.Raw(value)) == number


_TEXTS = st.text(st.sampled_from("0123456789._+-eE \t\u00a0x"), max_size=8).map(json.dumps)
_NUMBERS = st.one_of(st.integers(-10, 10**6), st.floats(-10, 10**6), st.integers(0, 10**6).map(float), st.booleans())


@given(st.one_of(_TEXTS, _NUMBERS.map(json.dumps)))
def test_every_number_that_pydantic_takes_is_read_alike(written: str) -> None:
    try:
        number = Asked.model_validate_json(f'{{"number":{written}}}').number
    except pydantic.ValidationError:
        return  # the engine refuses it
    if number is not None and number > 0:
        assert whole_number(msgspec.Raw(written.encode())) == number
    else:
        assert whole_number(msgspec.Raw(written.encode())) is None


@pytest.mark.parametrize(
    "written",
    ["true", "false", "null", "1", "0", "1.0", "10e-1", "2", '"true"', '"TRUE"', '"t"', '"yes"', '"y"', '"on"', '"1"',
     '"false"', '"no"', '"0"', '"x"', '""', "[]", "{}", "[true]", '"%s"' % ("1" * 100)],
)  # fmt: skip
def test_flag_is_what_engines_make_of_it(written: str) -> None:
    try:
        flag = Asked.model_validate_json(f'{{"flag":{written}}}').flag
    except pydantic.ValidationError:
        flag = None
    assert is_true(msgspec.Raw(written.encode())) is bool(flag)
