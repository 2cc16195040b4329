"""What the user of a Python SDK sees of each case: one JSON line for each, on standard output."""

import json
import sys

TIMEOUT_S = 20  # SDKs wait ten minutes; no case here is about silence


def watch(ask):
    """Play the cases of standard input; `ask(base_url, key, model, stream, say)` calls `say` with each text."""
    base_url = sys.argv[1]
    for line in sys.stdin:
        case = json.loads(line)
        pieces, error = [], None
        try:
            ask(base_url, case["key"], case["model"], case["stream"], pieces.append)
        except Exception as raised:
            error = raised
        bases = [_name(each) for each in type(error).__mro__] if error is not None else []
        seen = {"bases": bases, "message": str(error) if error is not None else "", "text": "".join(pieces)}
        print(json.dumps({"case": case["case"], "facts": _facts(error)} | seen), flush=True)


def _facts(error):
    """Return what programs read of an exception, where it has that; `kind of body` is what a body's `type` says."""
    body = getattr(error, "body", None)
    facts = {
        "type": getattr(error, "type", None),
        "request id": getattr(error, "request_id", None),
        "kind of body": body.get("type") if isinstance(body, dict) else None,
    }
    return {name: fact for name, fact in facts.items() if isinstance(fact, str)}


def _name(kind):
    """Return a class as users write it: `openai.RateLimitError`."""
    package = kind.__module__.partition(".")[0]
    return kind.__name__ if package in ("builtins", "__main__") else f"{package}.{kind.__name__}"
