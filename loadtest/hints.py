"""What a failure of the first run means, and what to do next."""

from typing import Final

_HINTS: Final = (
    ("status 429", "over a limit of the key or the model: ask slower (--request-rate 1), or a model without limits"),
    ("status 401", "the key is not known: give one with --api-key or $OPENAI_API_KEY"),
    ("status 403", "the key may not call this model: name another with --model"),
    ("status 404", "no such model or path: name one with --model; GET /v1/models lists them"),
    ("status 413", "the prompt is over the server's limit: lower --input-len"),
    ("status 421", "the server serves another host name: give it with --host"),
    ("status 502", "the server answers, the model behind it does not: look at the server's log"),
    ("status 503", "the server has no model behind it, or no room: look at its /readyz, or lower --max-concurrency"),
    ("status 504", "the model behind the server is too slow: lower --request-rate"),
    ("certificate", "the server's certificate is not trusted here: use a name that it is for"),
    ("connect: Connection refused", "nobody listens there: start the server, or give its URL with --target"),
    ("connect: ", "the address cannot be reached: check --target"),
    ("no connection within", "the server does not accept: lower --request-rate, or look whether it is overloaded"),
    ("answer within", "answers take longer than --timeout: raise it, or lower --request-rate"),
)


def hint(error: str) -> str:
    """Return what a failure means and the next step, "" for one of which nothing is known."""
    return next((text for part, text in _HINTS if part in error), "")
