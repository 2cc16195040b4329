"""Writes `tiny.gguf`, a random Qwen2 of two layers with a token for each byte, into the directory that it is given."""

import sys
from pathlib import Path

import gguf
import numpy as np
from byte_tokens import CHAT_TEMPLATE, LEANING, SEEN, SPECIAL, leanings, names

HIDDEN, LAYERS, HEADS, FEED_FORWARD, CONTEXT = 128, 2, 4, 256, 8192

tokens = [*names(), *SPECIAL]
merged = tokens[ord("h")], tokens[ord("e")]  # the format wants a merge
tokens.append("".join(merged))
random = np.random.default_rng(1)


def weights(*shape: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """Return small random weights."""
    return (random.standard_normal(shape) * 0.05).astype(np.float32)


writer = gguf.GGUFWriter(Path(sys.argv[1]) / "tiny.gguf", "qwen2")
writer.add_name("tiny")
writer.add_context_length(CONTEXT)
writer.add_embedding_length(HIDDEN)
writer.add_block_count(LAYERS)
writer.add_feed_forward_length(FEED_FORWARD)
writer.add_head_count(HEADS)
writer.add_head_count_kv(HEADS)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_rope_freq_base(10_000.0)
writer.add_file_type(0)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("qwen2")
writer.add_token_list(tokens)
writer.add_token_types([1] * 256 + [3] * len(SPECIAL) + [1])
writer.add_token_merges([" ".join(merged)])
writer.add_eos_token_id(256 + SPECIAL.index("<|im_end|>"))
writer.add_pad_token_id(256 + SPECIAL.index("<|endoftext|>"))
writer.add_add_bos_token(False)
writer.add_chat_template(CHAT_TEMPLATE)
embeddings, output = weights(len(tokens), HIDDEN) * 10, weights(len(tokens), HIDDEN)
embeddings[:, 0] = LEANING
output[:, 0] = np.array([*leanings(), 0]) / SEEN
writer.add_tensor("token_embd.weight", embeddings)
writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
writer.add_tensor("output.weight", output)
for layer in range(LAYERS):
    block = f"blk.{layer}"
    for norm in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"{block}.{norm}.weight", np.ones(HIDDEN, np.float32))
    for part in "qkv":
        writer.add_tensor(f"{block}.attn_{part}.weight", weights(HIDDEN, HIDDEN))
        writer.add_tensor(f"{block}.attn_{part}.bias", weights(HIDDEN))
    writer.add_tensor(f"{block}.attn_output.weight", weights(HIDDEN, HIDDEN))
    writer.add_tensor(f"{block}.ffn_gate.weight", weights(FEED_FORWARD, HIDDEN))
    writer.add_tensor(f"{block}.ffn_up.weight", weights(FEED_FORWARD, HIDDEN))
    writer.add_tensor(f"{block}.ffn_down.weight", weights(HIDDEN, FEED_FORWARD))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
