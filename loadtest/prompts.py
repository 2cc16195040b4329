"""Prompts from a file: texts, chats, conversations, and traces of production.

Each line of JSON is one of: `{"prompt": …}` or `{"text": …}`; a body of chat (`{"messages": …, "tools": …}`), also as a
line of OpenAI's batches (`{"body": …}`); a conversation (`{"turns": [{"text": …, "delay": ms}, …]}`, as aiperf has
them, or ShareGPT's `{"conversations": …}`); a request of Mooncake's traces (FAST '25: `timestamp` in ms,
`input_length`, `output_length`, `hash_ids` of blocks of 512 tokens). Lines of one `session_id` are one conversation. A
`.csv` is a trace of Azure's (AzurePublicDataset: `TIMESTAMP,ContextTokens,GeneratedTokens`).
"""

import csv
import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson

from loadtest.dialects import Message
from loadtest.workload import Turn

BLOCK_TOKENS: Final = 512  # of one of Mooncake's hashes
# Most tokenizers have each of these as one token, a blank before it included.
_WORDS: Final = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman"),
    *("life", "child", "world", "school", "state", "family", "student", "group"),
)
_NUMBER_WORDS: Final = 8
_LENGTHS: Final = ("output_length", "output_tokens", "max_completion_tokens", "max_tokens", "max_output_tokens")
_OURS: Final = {*_LENGTHS, "model", "stream", "stream_options", "timestamp", "delay", "session_id", "custom_id"}


@dataclass(slots=True)
class Line:
    """What a line asks for; a prompt of which only the length is known is made when it is sent."""

    messages: Sequence[Message] = ()
    input_tokens: int = 0
    blocks: Sequence[int] = ()
    output_len: int = 0
    delay_s: float = 0.0
    members: Mapping[str, Any] = field(default_factory=dict)

    def turn(self, number: int, output_len: int) -> Turn:
        """Return the turn, for the conversation `number`; `output_len` is that of a line that says none."""
        messages = self.messages or [{"role": "user", "content": self._made(number)}]
        return Turn(messages, self.output_len or output_len, self.delay_s, self.members)

    def _made(self, number: int) -> str:
        if not self.blocks:
            return _block(number, self.input_tokens)
        last = self.input_tokens - BLOCK_TOKENS * (len(self.blocks) - 1)
        return "".join([*(_block(each, BLOCK_TOKENS) for each in self.blocks[:-1]), _block(self.blocks[-1], last)])


@dataclass(slots=True)
class Conversation:
    """Lines that follow one another, and when the first is sent, in seconds of the file's own clock."""

    lines: list[Line]
    at_s: float | None = None


@dataclass(slots=True)
class Prompts:
    """The conversations of a file, over and over; a source of turns."""

    conversations: Sequence[Conversation]
    output_len: int

    def conversation(self, number: int) -> Sequence[Turn]:
        """Return the turns of the conversation `number`."""
        lines = self.conversations[number % len(self.conversations)].lines
        return [line.turn(number, self.output_len) for line in lines]

    def times(self, speed: float = 1.0) -> list[float] | None:
        """Return when each conversation begins, in seconds from the first one; None where the file does not say.

        Raises: `ValueError` where only some lines have a timestamp, and where they go back.
        """
        told = [each.at_s for each in self.conversations]
        times = [each for each in told if each is not None]
        if not times:
            return None
        if len(times) < len(told):
            raise ValueError(f"{len(told) - len(times)} lines have no timestamp, though others have: give one to all")
        if times != sorted(times):
            raise ValueError("timestamps go back: sort the lines by time")
        return [(each - times[0]) / speed for each in times]


def read(path: Path, output_len: int) -> Prompts:
    """Return the prompts of a file; raises `ValueError`, which tells the line and what to write, and `OSError`."""
    content = path.read_bytes()
    conversations = _trace(content) if path.suffix == ".csv" else _lines(content)
    if not conversations:
        raise ValueError("there is no prompt in it: write one JSON object a line")
    return Prompts(conversations, output_len)


def _lines(content: bytes) -> list[Conversation]:
    conversations: list[Conversation] = []
    sessions: dict[str, Conversation] = {}
    for number, text in enumerate(content.splitlines(), 1):
        if not text.strip():
            continue
        try:
            document = orjson.loads(text)
            conversation = _conversation(document)
            session = document.get("session_id")
        except (orjson.JSONDecodeError, AttributeError):
            raise ValueError(f"line {number} is no JSON object") from None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"line {number}: {_WRITE} ({type(error).__name__}: {error})") from None
        if session is not None and session in sessions:
            sessions[session].lines += conversation.lines
            continue
        conversations.append(conversation)
        if session is not None:
            sessions[session] = conversation
    return conversations


_WRITE: Final = 'write "prompt", "messages", "turns", or "input_length" and "output_length"'


def _conversation(document: Mapping[str, Any]) -> Conversation:
    at = document.get("timestamp")
    at_s = None if at is None else float(at) / 1e3
    if "turns" in document:
        turns = document["turns"]
    elif "conversations" in document:  # what the model once answered is not needed: another one answers now
        turns = [each["value"] for each in document["conversations"] if each["from"] in ("human", "user")]
    else:
        turns = [document.get("body", document)]
    if not turns:
        raise ValueError("nobody says anything")
    return Conversation([_line(each) for each in turns], at_s)


def _line(told: Mapping[str, Any] | str) -> Line:
    if isinstance(told, str):
        return Line([{"role": "user", "content": told}])
    output_len = next((int(told[name]) for name in _LENGTHS if told.get(name)), 0)
    delay_s = float(told.get("delay") or 0) / 1e3
    if "input_length" in told:
        tokens, blocks = int(told["input_length"]), list(map(int, told.get("hash_ids") or ()))
        if not max(0, len(blocks) - 1) * BLOCK_TOKENS < tokens:
            raise ValueError(f"input_length {tokens} is too short for {len(blocks)} blocks of {BLOCK_TOKENS} tokens")
        return Line((), tokens, blocks, output_len, delay_s)
    name = next((each for each in ("messages", "prompt", "text", "input") if each in told), "prompt")
    content = told[name]
    members = {own: value for own, value in told.items() if own != name and own not in _OURS}
    if name == "messages":
        if not content or not all(isinstance(each["role"], str) for each in content):
            raise ValueError("messages are a list of objects with a role")
        return Line(content, output_len=output_len, delay_s=delay_s, members=members)
    texts = [content] if isinstance(content, str) else content
    if not texts or not all(isinstance(each, str) for each in texts):
        raise ValueError(f"{name} is no text")
    return Line([{"role": "user", "content": each} for each in texts], 0, (), output_len, delay_s, members)


def _trace(content: bytes) -> list[Conversation]:
    rows: Iterable[Mapping[str, str]] = csv.DictReader(io.StringIO(content.decode()))
    conversations = []
    for number, row in enumerate(rows, 2):
        try:
            at_s = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26]).replace(tzinfo=UTC).timestamp()
            line = Line((), int(row["ContextTokens"]), (), int(row["GeneratedTokens"]))
        except (KeyError, TypeError, ValueError):
            expected = "TIMESTAMP,ContextTokens,GeneratedTokens under that header"
            raise ValueError(f"line {number}: write {expected}, such as 2023-11-16 18:17:03.9799600,4808,10") from None
        conversations.append(Conversation([line], at_s))
    return conversations


@functools.lru_cache(maxsize=4096)  # blocks that requests share; some 10 MB
def _block(number: int, tokens: int) -> str:
    """Return a text of so many words that begins as no other number's does."""
    digits = [_WORDS[number >> 4 * place & 15] for place in range(_NUMBER_WORDS)]
    return "".join(f" {word}" for word in digits[:tokens]) + " word" * (tokens - len(digits))
