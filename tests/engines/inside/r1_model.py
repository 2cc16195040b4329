"""Writes `r1`, a random Qwen2 as `tiny` is, that thinks as DeepSeek-R1 does, into the directory that it is given."""

import sys
from pathlib import Path

from byte_tokens import SPECIAL, leanings
from transformers_model import write

THINKS = ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<think>", "</think>")
LEANS_TO_THE_END = 1.5  # nearly as much as to a letter
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<\uff5cAssistant\uff5c>{{ m['content'].split('</think>')[-1] }}<|im_end|>"
    "{% else %}<\uff5cUser\uff5c>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<\uff5cAssistant\uff5c><think>\n{% endif %}"
)

leans = [*leanings(), -6.0, -6.0, -6.0, LEANS_TO_THE_END]
write(Path(sys.argv[1]) / "r1", (*SPECIAL, *THINKS[:2]), THINKS[2:], TEMPLATE, leans)
