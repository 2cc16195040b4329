#!/usr/bin/env bash
# llama.cpp's server: a stream of two prompts has an event `data: null` in it.
#
# `/v1/completions` takes a list of prompts. With one prompt every event of the stream is a chunk; with two one event is
# `null`, which is none of OpenAI's API. OpenAI's SDK for Python gives its caller None in place of a chunk, so that the
# usual loop over `chunk.choices` ends with an AttributeError. Without a stream two prompts get an answer as documented.
# Seen with xllamacpp 2026.10.11549, which carries the server, a random model of one layer, and openai 3.57.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check xllamacpp==2026.10.11549 gguf==0.19.0 openai==3.57.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import socket

import gguf
import numpy
import openai
import xllamacpp

HIDDEN = 64
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


client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")


def chunks(prompts: list[str]) -> list[str]:
    stream = client.completions.create(model="m", prompt=prompts, max_tokens=2, stream=True)
    return [type(chunk).__name__ for chunk in stream]


ASKED = 10
one, two = ([chunks(prompts) for _ in range(ASKED)] for prompts in (["Hello"], ["Hello", "Good morning"]))
print("of one prompt:", *one[:2])
print("of two prompts:", *two[:2])
assert not any("NoneType" in each for each in one)
assert all(each.count("NoneType") == 1 for each in two), "the behaviour has changed"
PYTHON
