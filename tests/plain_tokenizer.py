"""The tokenizer of the tiny random models."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reasonscope.probes.architecture.families import VOCAB


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """A token a letter or tag, as many as the tiny models have."""
    words = ["<pad>", "<s>", "</s>", "<think>", "</think>", "Ġ", "Ċ", *(chr(33 + i) for i in range(VOCAB - 7))]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<pad>", "<s>", "</s>"])
    inner.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
