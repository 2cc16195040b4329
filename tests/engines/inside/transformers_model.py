"""Writes `tiny`, a random Qwen2 of two layers with a token for each byte, into the directory that it is given."""

import sys
from pathlib import Path

import torch
from byte_tokens import CHAT_TEMPLATE, LEANING, SEEN, SPECIAL, leanings, names
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


def write(folder: Path, special: tuple[str, ...], added: tuple[str, ...], template: str, leans: list[float]) -> None:
    """Write a model that leans to its tokens as it is told; `special` ones are in no text, `added` ones are."""
    tokenizer = Tokenizer(models.BPE(vocab={name: byte for byte, name in enumerate(names())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(added))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=272,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=256 + SPECIAL.index("<|im_end|>"),
        pad_token_id=256 + SPECIAL.index("<|endoftext|>"),
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    leans = [*leans, *(-6.0 for _ in range(config.vocab_size - len(leans)))]
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(25)  # from the 0.02 that they begin with
        model.model.embed_tokens.weight[:, 0] = LEANING
        model.lm_head.weight.mul_(2.5)
        model.lm_head.weight[:, 0] = torch.tensor(leans) / SEEN
    model.save_pretrained(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]) / "tiny", SPECIAL, (), CHAT_TEMPLATE, leanings())
