"""Think tags: how a model marks its thinking, as its tokenizer and chat template say."""

from transformers import PreTrainedTokenizerBase

from reasonscope.data.errors import InputError
from reasonscope.data.text.parse import GPT_OSS, THINK, ThinkTags

# Pairs in use, the most common first. Their token ids differ between models, and some models split them into several tokens.
_KNOWN = (
    GPT_OSS,
    THINK,
    ThinkTags(open="<thinking>", close="</thinking>"),
    ThinkTags(open="<|begin_of_thought|>", close="<|end_of_thought|>"),
    ThinkTags(open="[THINK]", close="[/THINK]"),
    ThinkTags(open="◁think▷", close="◁/think▷"),
)


def find_tags(tokenizer: PreTrainedTokenizerBase) -> ThinkTags | None:
    """The tags among the tokenizer's added tokens or in its chat template, or None for a model that does not mark its thinking.

    gpt-oss is recognised by its channel tokens, because its templates write the opening of a channel in parts.
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
    """The template that renders a conversation, or None. If the tokenizer has several, it is the one named "default"."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise InputError(f"the chat template is a {type(template).__name__}; it must be Jinja text")
    return template


def with_tag_open(text: str, tags: ThinkTags) -> str:
    """The rendered prompt with the think tag open at its end, added unless the template has opened it already."""
    head, tag, behind = text.rpartition(tags.open)
    if tag and not behind.strip():
        return text
    if tag and behind.strip() == tags.close:  # the template switched thinking off
        text = head
    return f"{text}{tags.open}" if tags == GPT_OSS else f"{text}{tags.open}\n"


def with_thinking_closed(text: str, tags: ThinkTags) -> str:
    """The rendered prompt with an empty think block at its end, so that the model goes straight to the answer."""
    head, tag, behind = text.rpartition(tags.open)
    if tag and behind.strip() == tags.close:
        return text
    if tag and not behind.strip():
        text = head
    block = tags.open + tags.close if tags == GPT_OSS else f"{tags.open}\n\n{tags.close}\n\n"
    return text + block


def with_reasoning(prompt: str, reasoning: str, text: str, tags: ThinkTags) -> str:
    """What a model wrote after `prompt`, which may have opened the thinking, if a server has parted its reasoning from its text.

    Without text the thinking stays open, because the model was cut off. Servers drop the white space at the tags, which is here as most
    templates have it.
    """
    line = "" if tags == GPT_OSS else "\n"
    opening = "" if prompt.rstrip().endswith(tags.open) else tags.open + line
    closing = f"{line}{tags.close}{2 * line}{text}" if text.strip() else ""
    return f"{opening}{reasoning.strip()}{closing}"
