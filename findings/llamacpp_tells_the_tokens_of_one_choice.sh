#!/usr/bin/env bash
# llama.cpp's server: the `usage` of a document with several choices counts one of them, its stream counts all.
#
# With `n` = 2 a document has both choices and half of the tokens that were made; with two prompts `usage` has one prompt
# and one answer. The server's own `llamacpp:tokens_predicted_total` counts them all, and so do the usage frames of a
# stream, one behind each choice. OpenAI's `completion_tokens` is the "number of tokens in the generated completion", all
# choices together: https://platform.openai.com/docs/api-reference/chat/object. Who bills by the document bills a part.
# Seen with xllamacpp 2026.10.11549, which carries the server, and a random model of one layer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check xllamacpp==2026.10.11549 gguf==0.19.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import re
import socket
import urllib.request

import gguf
import numpy
import xllamacpp

HIDDEN, TOKENS = 64, 8
visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
spare = iter(range(256, 512))
tokens = [chr(byte if byte in visible else next(spare)) for byte in range(256)]  # as GPT-2 names bytes
tokens += ["<|im_start|>", "<|im_end|>", tokens[104] + tokens[101]]
draws = numpy.random.default_rng(1)

writer = gguf.GGUFWriter("tiny.gguf", "qwen2")
writer.add_context_length(512)
writer.add_embedding_length(HIDDEN)
writer.add_block_count(1)
writer.add_feed_forward_length(HIDDEN)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("qwen2")
writer.add_token_list(tokens)
writer.add_token_types([1] * 256 + [3, 3, 1])
writer.add_token_merges([f"{tokens[104]} {tokens[101]}"])
writer.add_eos_token_id(257)
writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
shapes = {"token_embd.weight": (len(tokens), HIDDEN), "output.weight": (len(tokens), HIDDEN), "output_norm.weight": (HIDDEN,)}
for part in ("attn_q", "attn_k", "attn_v"):
    shapes |= {f"blk.0.{part}.weight": (HIDDEN, HIDDEN), f"blk.0.{part}.bias": (HIDDEN,)}
for part in ("attn_output", "ffn_gate", "ffn_up", "ffn_down"):
    shapes[f"blk.0.{part}.weight"] = (HIDDEN, HIDDEN)
for part in ("attn_norm", "ffn_norm"):
    shapes[f"blk.0.{part}.weight"] = (HIDDEN,)
for name, shape in shapes.items():
    values = numpy.ones(shape) if "norm" in name else draws.standard_normal(shape) * 0.1
    writer.add_tensor(name, values.astype(numpy.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.port, parameters.warmup = "tiny.gguf", 512, port, False
parameters.n_parallel, parameters.kv_unified, parameters.endpoint_metrics = 4, True, True
server = xllamacpp.Server(parameters)


def answered(path: str, **body: object) -> bytes:
    data = json.dumps({"model": "m", "max_tokens": TOKENS, "ignore_eos": True, **body}).encode() if body else None
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        content: bytes = answer.read()
    return content


def predicted() -> int:
    return int(re.search(rb"^llamacpp:tokens_predicted_total (\d+)", answered("/metrics"), re.MULTILINE)[1])


def used(path: str, **body: object) -> tuple[int, int, int]:
    """Return how many choices came, how many tokens `usage` tells of them, and how many the server counted."""
    before = predicted()
    answer = json.loads(answered(path, **body))
    return len(answer["choices"]), answer["usage"]["completion_tokens"], predicted() - before


chat = {"messages": [{"role": "user", "content": "Hello"}]}
seen = {
    "n = 2": used("/v1/chat/completions", n=2, **chat),
    "three prompts": used("/v1/completions", prompt=["a", "b", "c"]),
}
stream = answered("/v1/chat/completions", n=2, stream=True, stream_options={"include_usage": True}, **chat)
told = [int(count) for count in re.findall(rb'"completion_tokens":(\d+)', stream)]
print("choices, tokens told, tokens counted:", seen, "and of a stream with n = 2, told:", told)
expected = {"n = 2": (2, TOKENS, 2 * TOKENS), "three prompts": (3, TOKENS, 3 * TOKENS)}
assert (seen, told) == (expected, [TOKENS, TOKENS]), "the behaviour has changed"
PYTHON
