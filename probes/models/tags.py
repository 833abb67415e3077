"""Think tags: how a model marks its thinking, as its tokenizer and chat template say."""

from transformers import PreTrainedTokenizerBase

from reasonscope.data.errors import InputError
from reasonscope.data.text.think_tags import GEMMA_4, GPT_OSS, KNOWN_TAGS, THINK, ThinkTags
from reasonscope.data.text.thinking import Thinking

_WRAPPERS = ("<response>", "<answer>")  # what opens the answer after </think> in Granite 3.3 and Hunyuan


def find_thinking(tokenizer: PreTrainedTokenizerBase, asked: Thinking | None, *, name: str) -> Thinking:
    """How to find thinking: as `asked`, with the model's own tags if no others are named; by default by tags if it has any, else in the
    open. Raises InputError if tags are asked for and the model names none."""
    if asked is not None and (asked.mode != "tags" or asked.tags is not None):
        return asked
    tags = _find_tags(tokenizer)
    if tags is not None:
        return Thinking(tags=tags)
    if asked is not None:
        raise InputError(
            f"neither the tokenizer nor the chat template of {name} marks thinking; name the tags (--think-tags OPEN CLOSE, "
            "or load_model(…, tags=ThinkTags(…))), or choose --thinking completion"
        )
    return Thinking(mode="completion")


def _find_tags(tokenizer: PreTrainedTokenizerBase) -> ThinkTags | None:
    """The tags among the tokenizer's added tokens or in its chat template, or None for a model that does not mark its thinking.

    gpt-oss and Gemma 4 are recognised by their channel tokens, because templates may write the opening of a channel in parts.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if {"<|channel|>", "<|message|>"} <= added:
        return GPT_OSS
    if {"<|channel>", "<channel|>"} <= added:
        return GEMMA_4
    template = chat_template(tokenizer) or ""
    for tags in KNOWN_TAGS:
        if {tags.open, tags.close} <= added or (tags.open in template and tags.close in template):
            return _with_wrapper(tags, template)
    return THINK if THINK.close in template else None


def _with_wrapper(tags: ThinkTags, template: str) -> ThinkTags:
    """The tags, with what opens the answer if the template names it."""
    if tags != THINK:
        return tags
    wrapper = next((text for text in _WRAPPERS if text in template and text.replace("<", "</") in template), "")
    return ThinkTags(open=tags.open, close=tags.close, answer=wrapper)


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
    elif text.rstrip().endswith(tags.close):  # it did so with a closing tag alone
        text = text.rstrip().removesuffix(tags.close)
    return f"{text}{tags.open}" if tags == GPT_OSS else f"{text}{tags.open}\n"


def with_thinking_closed(text: str, tags: ThinkTags) -> str:
    """The rendered prompt with an empty think block at its end, so that the model goes straight to the answer.

    A template that switches thinking off has closed it already: with an empty block, a block that says so, or a closing tag alone.
    """
    if text.rstrip().endswith(tags.close):
        return text
    head, tag, behind = text.rpartition(tags.open)
    if tag and not behind.strip():
        text = head
    return text + _empty_block(tags)


def _empty_block(tags: ThinkTags) -> str:
    if tags == GPT_OSS:
        return tags.open + tags.close
    if tags == GEMMA_4:
        return f"{tags.open}\n{tags.close}"
    return f"{tags.open}\n\n{tags.close}\n\n"


def with_reasoning(prompt: str, reasoning: str, text: str, tags: ThinkTags) -> str:
    """What a model wrote after `prompt`, which may have opened the thinking, if a server has parted its reasoning from its text.

    Without text the thinking stays open, because the model was cut off. Most servers drop the white space at the tags, which is here as
    most templates have it; text that begins with its own keeps it.
    """
    line = "" if tags == GPT_OSS else "\n"
    opening = "" if prompt.rstrip().endswith(tags.open) else tags.open + line
    gap = "" if text[:1].isspace() else 2 * line
    closing = f"{line}{tags.close}{gap}{text}" if text.strip() else ""
    return f"{opening}{reasoning.strip()}{closing}"
