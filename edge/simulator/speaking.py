"""A model whose text depends on its prompt, and its tokenizer: two that were asked alike say the same.

The next token follows from all the text before it, as a greedy model's does, so who goes on with a text in its prompt
says what the first one would have said. Each token has its number in it: an answer ends at `tokens`, wherever it began.
"""

import re
import secrets
import zlib
from dataclasses import replace
from hashlib import blake2b
from typing import Any, Final

import msgspec
import orjson

from edge.simulator import questions, thoughts, validation
from edge.simulator.behaviour import Behaviour, Dialect, Refusal
from edge.simulator.questions import CHAT, COMPLETIONS, Ask, Question, WrongMember, member

_TOKEN: Final = re.compile(r'<think>\n|</?think>|\s*(?:(?!</?think>)[^\s\d])+\d*"?|\s*\d+"?|\s+')
_LAST_NUMBER: Final = re.compile(r'(\d+)"?\Z')
_OPENS: Final = " <|start|> assistant:"
_MOST_TEXTS: Final = 100_000
_texts: dict[int, str] = {}  # of tokens by their ids, those that were asked for long ago forgotten


def tokens_of(text: str) -> list[str]:
    """Return the tokens of a text; those of texts that were said are what was said."""
    return _TOKEN.findall(text)


def ids_of(text: str) -> list[int]:
    """Return the ids of the tokens of a text."""
    ids = []
    for token in tokens_of(text):
        ids.append(zlib.crc32(token.encode()))
        _texts.pop(ids[-1], None)
        _texts[ids[-1]] = token  # the newest one now
    while len(_texts) > _MOST_TEXTS:
        del _texts[next(iter(_texts))]
    return ids


def text_of(ids: list[int]) -> str:
    """Return the text of ids that were given here; of others a mark."""
    return "".join(_texts.get(each, "\ufffd") for each in ids)


class Prompt(msgspec.Struct, frozen=True):
    """What the model reads: a text, that of the template included, and its ids."""

    text: str
    ids: tuple[int, ...]


class _Message(msgspec.Struct):
    role: str = "user"
    content: Any = ""

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else orjson.dumps(self.content).decode()


def prompt_of(path: str, ask: Ask, behaviour: Behaviour) -> Prompt:
    """Return what a question makes the model read.

    Raises: `Refusal` where the dialect refuses its flags.
    """
    if path == COMPLETIONS:
        given = member(ask, "prompt", str | list[int | str], "")
        if isinstance(given, list):
            return _completed("".join(each if isinstance(each, str) else text_of([each]) for each in given))
        return _completed(given)
    params = ask.kv_transfer_params
    if behaviour.dialect == "vllm" and params and params.prompt_token_ids and not behaviour.ignores_flags:
        return Prompt(text_of(params.prompt_token_ids), tuple(params.prompt_token_ids))
    messages = member(ask, "messages", list[_Message], [])
    goes_on = _goes_on(ask, behaviour) and messages and messages[-1].role == "assistant"
    told = messages[:-1] if goes_on else messages
    text = "".join(f" <|start|> {each.role}:{each.text} <|end|>" for each in told) + _OPENS
    last = messages[-1].text.strip() if behaviour.trims and messages else messages[-1].text if messages else ""
    if behaviour.thinks:
        return _completed(text + (thoughts.goes_on(behaviour.dialect, last) if goes_on else thoughts.OPENS))
    return _completed(text + (last if goes_on else ""))


def _completed(text: str) -> Prompt:
    return Prompt(text, tuple(ids_of(text)))


def _goes_on(ask: Ask, behaviour: Behaviour) -> bool:
    """Whether the last message, if it is the assistant's, is gone on with; as the engines do with either flag."""
    if behaviour.ignores_flags:
        return False
    opens = ask.add_generation_prompt is not False
    match behaviour.dialect:
        case "vllm" | "llamacpp" if ask.continue_final_message and opens:
            raise Refusal(400, "Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
        case "vllm" | "sglang":
            return bool(ask.continue_final_message)
        case "llamacpp":
            return True
        case "openai":
            return False


def said_to(path: str, ask: Ask, behaviour: Behaviour) -> tuple[str, ...] | None:
    """Return the tokens of the answer; None where the text depends on nothing."""
    if not speaks(path, behaviour):
        return None
    prompt = prompt_of(path, ask, behaviour).text
    begins = path == CHAT and prompt.endswith((_OPENS, thoughts.OPENS))
    last = None if begins else _LAST_NUMBER.search(prompt)
    first = int(last[1]) + 1 if last is not None else 0
    if prompt.endswith(thoughts.ENDS):
        first = behaviour.thinks + 1
    chance = _chance_of(ask)
    read = blake2b(f"{behaviour.weights}\n{prompt}".encode(), digest_size=8)
    tokens: list[str] = []
    for number in range(first, behaviour.tokens):
        told = read.copy()
        told.update(b"\n%b %d" % (chance, len(tokens) if chance else 0))
        ends_thought = behaviour.thinks == number > 0
        tokens.append(thoughts.ENDS if ends_thought else _word(number, told.hexdigest()))
        read.update(tokens[-1].encode())
    return tuple(tokens)


def parsed(path: str, ask: Ask, behaviour: Behaviour, question: Question) -> Question:
    """Return a question with what is told of its prompt: whether a thought is open at its end, and its ids."""
    if path != CHAT or not speaks(path, behaviour) or not (behaviour.thinks or ask.return_token_ids):
        return question
    prompt = prompt_of(path, ask, behaviour)
    thinks = thoughts.goes_on_thinking(prompt.text) if behaviour.thinks else None
    told = bool(ask.return_token_ids) and behaviour.dialect == "vllm" and not behaviour.ignores_flags
    return replace(question, thinks=thinks, prompt_ids=prompt.ids if told else None)


def speaks(path: str, behaviour: Behaviour) -> bool:
    """Whether the text depends on the prompt."""
    return behaviour.text == "prompt" and path in (CHAT, COMPLETIONS)


def _chance_of(ask: Ask) -> bytes:
    """Return what makes answers to one prompt differ: a seed, begun anew with each request, or nothing known."""
    if ask.temperature == 0:
        return b""
    return b"%d" % ask.seed if ask.seed is not None else secrets.token_bytes(8)


def _word(number: int, chosen: str) -> str:
    """Return a token: as those of `scripts.token_text`, letters of it chosen; no digit, which ends each."""
    letters = "".join(chr(ord("a") + int(each, 16)) for each in chosen[:3])
    match number % 8:
        case 3:
            return f"你好{letters}{number}"
        case 5:
            return f' "{letters}{number}"'
        case 7:
            return f"\n\n{letters}{number}"
        case _:
            return f" {letters}{number}"


def tokenized(dialect: Dialect, path: str, ask: Ask, behaviour: Behaviour) -> list[int]:
    """Return the ids that `tokenize` gives for a text or for messages.

    Raises: `Refusal` for flags that SGLang takes for an answer only.
    """
    if dialect == "llamacpp":
        return ids_of(member(ask, "content", str, ""))
    if ask.messages:
        if dialect == "sglang" and ask.continue_final_message and ask.add_generation_prompt is False:
            raise validation.invalid(dialect, path, "value_error", ("body",), "Value error, both flags were given.", {})
        return list(prompt_of(CHAT, ask, behaviour).ids)
    return ids_of(member(ask, "prompt", str, ""))


def rendered(ask: Ask, behaviour: Behaviour) -> dict[str, str]:
    """Return what llama.cpp's template makes of messages."""
    return {"prompt": prompt_of(CHAT, ask, behaviour).text}


def counted(path: str, ask: Ask, behaviour: Behaviour) -> Behaviour:
    """Return the behaviour with as many tokens of the prompt as there are, where they are counted.

    Raises: `Refusal`, as `prompt_of` does.
    """
    if not speaks(path, behaviour):
        return questions.counted(path, ask, behaviour)
    try:
        return replace(behaviour, prompt_tokens=len(prompt_of(path, ask, behaviour).ids))
    except WrongMember:  # of which the answer says it
        return behaviour
