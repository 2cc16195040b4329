#!/usr/bin/env bash
# llama.cpp's server: a stream of `/v1/messages` has no `message_start` when the first token is half a character.
#
# With a tokenizer that falls back to bytes, many a character outside ASCII is several tokens. The server holds the first
# of them back, and with it the event that every message begins with: the stream begins with `content_block_start`. So
# nothing in it tells the id, the model or the tokens of the prompt. Anthropic describes `message_start` as the first
# event of every stream: https://docs.anthropic.com/en/docs/build-with-claude/streaming#event-types. Where the first token
# is whole, or can begin no character, it is there. In chat/completions the chunk with the role is missing likewise.
# Seen with xllamacpp 2026.10.11549, which carries the server, and a random model of one layer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check xllamacpp==2026.10.11549 gguf==0.19.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import socket
import urllib.request

import gguf
import numpy
import xllamacpp

ASKED, HIDDEN = 30, 64
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
parameters.sampling.temp, parameters.sampling.top_k = 1.0, 0
parameters.sampling.top_p, parameters.sampling.min_p = 1.0, 0.0
server = xllamacpp.Server(parameters)


def first_event() -> tuple[str, str]:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "stream": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/messages", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        lines = answer.read().decode().splitlines()
    kind = lines[0].removeprefix("event: ")
    texts = [json.loads(line[6:])["delta"]["text"] for line in lines if '"text_delta"' in line]
    return kind, "".join(texts)[:1]


firsts = [first_event() for _ in range(ASKED)]
kinds = {kind: [text for each, text in firsts if each == kind] for kind in dict(firsts)}
print("first events, and the first characters of their messages:", kinds)
assert kinds.keys() >= {"message_start", "content_block_start"}, "the behaviour has changed"
assert not any(text.isascii() for text in kinds["content_block_start"])
PYTHON
