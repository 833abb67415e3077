"""How a model marks its thinking, found in its tokenizer and chat template rather than assumed from token ids."""

from transformers import PreTrainedTokenizerBase

from reasonscope.data.errors import InputError
from reasonscope.data.text.parse import GPT_OSS, THINK, ThinkTags

# Pairs in use, the commonest first; the ids they have differ from model to model, and so does whether they are one token.
_KNOWN = (
    GPT_OSS,
    THINK,
    ThinkTags(open="<thinking>", close="</thinking>"),
    ThinkTags(open="<|begin_of_thought|>", close="<|end_of_thought|>"),
    ThinkTags(open="[THINK]", close="[/THINK]"),
    ThinkTags(open="◁think▷", close="◁/think▷"),
)


def find_tags(tokenizer: PreTrainedTokenizerBase) -> ThinkTags | None:
    """The tags that the tokenizer's added tokens or the chat template know, or None (a model that does not mark thinking).

    gpt-oss is known by its channel tokens: its templates write the parts of a channel's opening one by one.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if {"<|channel|>", "<|message|>"} <= added:
        return GPT_OSS
    template = chat_template(tokenizer) or ""
    for tags in _KNOWN:
        if {tags.open, tags.close} <= added or tags.close in template:
            return tags
    return None


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that renders a conversation (of several, the one named default), or None."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise InputError(f"the chat template is {type(template).__name__}; a Jinja text is needed")
    return template


def with_tag_open(text: str, tags: ThinkTags) -> str:
    """The rendered prompt with the thinking begun: as it is where the template has done so, otherwise with the tag behind it."""
    head, tag, behind = text.rpartition(tags.open)
    if tag and not behind.strip():
        return text
    if tag and behind.strip() == tags.close:  # the template switched thinking off
        text = head
    return f"{text}{tags.open}" if tags == GPT_OSS else f"{text}{tags.open}\n"


def with_thinking_closed(text: str, tags: ThinkTags) -> str:
    """The rendered prompt with an empty think block at its end, so that the answer comes next."""
    head, tag, behind = text.rpartition(tags.open)
    if tag and behind.strip() == tags.close:
        return text
    if tag and not behind.strip():
        text = head
    block = tags.open + tags.close if tags == GPT_OSS else f"{tags.open}\n\n{tags.close}\n\n"
    return text + block
