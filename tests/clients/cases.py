"""The failures that every client is shown, and what the docs say of each."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Case:
    """One kind of failure.

    `status`: of an answer that is an error, 0 for a stream that breaks. `own`: the edge itself refuses, so the client's
    attempts are counted at the edge and not at the model server. `words`: what the message must keep of the direct one.
    """

    name: str
    told: str
    status: int = 0
    own: bool = False
    words: str = ""

    @property
    def model(self) -> str:
        """The name by which a client asks for this failure; the edge has a route for all but the unknown one."""
        return "public/unknown" if self.name == "404" else f"public/m-{self.name}"


REFUSED: Final = "maximum context length is 1024"
BUSY: Final = "12 requests wait already"
BROKE: Final = "the engine ran out of memory"

CASES: Final = (
    Case("400", "the engine refuses the request", 400, words=REFUSED),
    Case("401", "a wrong key", 401, own=True),
    Case("403", "a model that the key may not use", 403, own=True),
    Case("404", "a model that does not exist", 404, own=True, words="public/unknown"),
    Case("429", "the engine is busy, `Retry-After: 1`", 429, words=BUSY),
    Case("500", "the engine fails", 500),
    Case("503", "the engine is not ready", 503),
    Case("504", "the engine is too slow", 504),
    Case("error-event", "a stream: an error event after two pieces of text", words=BROKE),
    Case("cut-between", "a stream: the connection is lost between two events"),
    Case("cut-within", "a stream: the connection is lost within an event"),
    Case("cut-unframed", "a stream that only the close ends: it closes within an event"),
    Case("clean-end", "a stream: it ends in order, without its last events"),
    Case("drain", "a stream: what the client is connected to stops (edge: SIGTERM; direct: the server closes)"),
)
