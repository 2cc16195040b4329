"""What a client's user saw of a failure, direct and through the edge, and which of the two is better."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from cases import Case
from sdks import Client

Rank = Literal["same", "better", "by design", "worse"]

SILENT: Final = "no exception"

# Where the edge differs and means it, as the document explains it.
BY_DESIGN: Final = (
    "Fewer attempts at a 504 are meant: a request that timed out costs the engine its whole time with each.",
    "A stream that broke ends with an error event: the one thing that all clients raise on. Some have one\n"
    "  exception for a lost connection, and another one for such an event, whose message says what was lost.",
    "A model that the key is denied has the code `permission_denied`. OpenAI says `model_not_found`, which some\n"
    "  clients take for a 404; here that is the code of a model that is not there.",
    "An engine's 500 is a 502, which says that it was not the edge that failed. It is retried alike, and one client\n"
    "  has an exception of its own for it.",
)
# The cases of the last two, in which a client may have another exception of its own.
_OTHER_CODE: Final = ("403", "500")

# The ends of the names of exceptions by which a client says that it does not understand what it was sent.
_UNREADABLE: Final = ("TypeValidationError", "JSONParseError", "SyntaxError", "JSONDecodeError")


@dataclass(frozen=True)
class Seen:
    """What came of one case.

    `bases`: the class of the exception and those above it, empty for none. `facts`: what programs read of it, by name.
    `asked`: requests that the client sent. `reached`: those that the model server got.
    """

    bases: tuple[str, ...]
    message: str
    facts: Mapping[str, str]
    text: str
    asked: int
    reached: int

    @property
    def kind(self) -> str:
        """The class of the exception."""
        return self.bases[0] if self.bases else SILENT


@dataclass(frozen=True)
class Verdict:
    """How the edge compares with the model server itself, and why."""

    rank: Rank
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.rank}: {self.reason}" if self.reason else self.rank


def judge(client: Client, case: Case, direct: Seen, edge: Seen) -> Verdict:
    """Return how the edge compares."""
    if not edge.bases:
        return Verdict("worse", "half an answer is taken as whole") if direct.bases else Verdict("same")
    if not direct.bases:
        return Verdict("better", "direct, half an answer is taken as whole")
    if case.words and case.words in direct.message and case.words not in edge.message:
        return Verdict("worse", "the words of the message are lost")
    tries = (direct.asked, edge.asked) if case.own else (direct.reached, edge.reached)
    attempts = "" if tries[0] == tries[1] else f"attempts: {tries[1]} for {tries[0]}"
    if attempts and not (case.name == "504" and tries[1] < tries[0]):
        return Verdict("worse", attempts)
    if direct.kind not in edge.bases:
        return _judge_classes(case, direct, edge, client.own)
    if lost := [name for name in direct.facts if name not in edge.facts]:
        return Verdict("worse", f"no {', no '.join(lost)}")
    if client.api == "messages" and case.status and not _is_type(case, direct, edge):
        return Verdict("worse", f"the type is {edge.facts['type']}")
    return Verdict("by design", attempts) if attempts else Verdict("same")


def _judge_classes(case: Case, direct: Seen, edge: Seen, own: tuple[str, ...]) -> Verdict:
    """Return how an exception compares that is not of the class which users know."""
    if _is_own(edge, own) and not _is_own(direct, own):
        return Verdict("better", "an exception of the SDK's own")
    if not (_is_own(edge, own) or _is_own(direct, own)):
        return Verdict("same", "another exception from below the SDK")
    if not case.status and _is_own(edge, own) and not edge.kind.endswith(_UNREADABLE):
        return Verdict("by design", "the exception of an event")
    if case.name in _OTHER_CODE and _is_own(edge, own):
        return Verdict("by design", "the exception of another code")
    return Verdict("worse", "another exception")


def _is_type(case: Case, direct: Seen, edge: Seen) -> bool:
    """Whether the type is Anthropic's of this status; it has none of its own for a 503."""
    return edge.facts["type"] == direct.facts["type"] or (case.status == 503 and edge.facts["type"] == "api_error")


def _is_own(seen: Seen, own: tuple[str, ...]) -> bool:
    return seen.kind.startswith(tuple(f"{package}." for package in own))


@dataclass(frozen=True)
class Row:
    """One cell of the matrix: a client and a case."""

    client: str
    api: str
    case: Case
    direct: Seen
    edge: Seen
    verdict: Verdict
