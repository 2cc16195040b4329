"""The meter of `messages`.

Source: docs.anthropic.com, "Streaming messages".
"""

from typing import Final

import msgspec

from edge.exchange import Usage, UsageSource
from edge.metering.events import Events, decoded, is_error
from edge.metering.usage_objects import ABSENT, Tokens, WithUsage, tokens_in, usage_of


class _MessageEvent(msgspec.Struct):
    type: str = ""
    message: WithUsage | None = None
    usage: msgspec.Raw = ABSENT
    error: msgspec.Raw = ABSENT


_message_event = msgspec.json.Decoder(_MessageEvent)
_MESSAGE_COUNTS: Final = (
    "input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens",
)  # fmt: skip


class MessageEvents(Events):
    """`messages`: the beginning has the prompt, the end the rest, and of each count the latest is right."""

    _latest: Tokens | None = None

    def _read(self, event: bytes) -> bytes:
        found = decoded(_message_event, event)
        if found is None:
            self._read_other(event)
        elif found.type == "content_block_delta":
            self._frames += 1
            self._take(None, is_last=False)
        elif found.type == "message_start" and found.message is not None:
            self._merge(found.message.usage, is_last=False)
        elif found.type == "message_delta":
            self._merge(found.usage, is_last=True)
        elif is_error(found.type, found.error, event):
            self._fail()
        elif found.type in self.last_events and self.failed:
            self._answers = True  # SGLang ends a message that failed as any other
        else:
            self._take(None, is_last=False)
            if found.type in self.last_events:
                self._note_last()
        return event

    def _merge(self, raw: msgspec.Raw, *, is_last: bool) -> None:
        tokens = tokens_in(raw)
        if tokens is not None and self._latest is not None:
            for name in _MESSAGE_COUNTS:
                if getattr(tokens, name) is None:
                    setattr(tokens, name, getattr(self._latest, name))
        self._latest = tokens or self._latest
        self._take(usage_of(tokens) if tokens is not None else None, is_last=is_last)

    def usage(self, whole: bool) -> Usage:
        used = super().usage(whole)
        if self._usage is None:
            return used
        if not self._is_last:  # the beginning of a message counts the prompt, and nothing of what came since
            counted = max(used.completion_tokens, self._tokens_seen())
            used = msgspec.structs.replace(used, completion_tokens=counted, source=UsageSource.ESTIMATED)
        if not used.prompt_tokens:  # llama.cpp leaves the beginning out where the first token is half a character
            used = msgspec.structs.replace(used, prompt_tokens=self.prompt_estimate, source=UsageSource.ESTIMATED)
        return used
