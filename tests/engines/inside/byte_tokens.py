"""The tokens of the tiny models: one for each byte, named as GPT-2 names bytes, and those of a chat."""

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def names() -> list[str]:
    """Return the name of each byte: itself where it is visible in Latin-1, else a letter from U+0100 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in visible else next(spare)) for byte in range(256)]


def leanings() -> list[float]:
    """Return how much the models lean to each token, in logits: mostly text in ASCII, some halves of characters.

    A random model would write random bytes, of which most are no character at all.
    """
    of_bytes = [2.0 if 32 <= byte < 127 else 0.0 if byte >= 128 else -6.0 for byte in range(256)]
    return [*of_bytes, *(-6.0 for _ in SPECIAL)]


LEANING = 8.0  # of each embedding in its first dimension, which stays about there through both layers
SEEN = 9.0  # what comes of it behind the last norm
