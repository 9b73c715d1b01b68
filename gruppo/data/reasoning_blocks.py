"""Answers of dataset rows after a prompt in which the chat template has opened, or emptied, the block of reasoning.

Such a template writes the answers of a conversation differently: with an empty block, without any, or as the row has
them, with tags of their own. What the model has to write after the prompt follows from the row all the same.
"""

from __future__ import annotations

import re

from gruppo.errors import UsageError

_BLOCK = re.compile(
    r"(?:(?P<open><(?P<tag>\w+)>)\s*(?P<close></(?P=tag)>)?"
    r"|(?P<opens>\[(?P<mark>[A-Z_]+)\])\s*(?P<closes>\[/(?P=mark)\])?)\s*$"
)


def written_answer(prompt: str, whole: str, content: str) -> str | None:
    """The text that follows a rendered prompt if its last message has this content; None if it does not end in a block
    of reasoning, or if `whole` does not continue it.

    `prompt`: rendered with the generation prompt; `whole`: with the answer. Raises UsageError if the answer has no
    reasoning although the prompt opens the block, or has some although the prompt ends the block.
    """
    found = _BLOCK.search(prompt)
    if found is None:
        return None
    opening = found["open"] or found["opens"]
    closing = opening[0] + "/" + opening[1:]
    head = prompt[: found.start()]
    if not whole.startswith(head):
        head = head.rstrip()
    if not whole.startswith(head):
        return None
    if found["close"] or found["closes"]:
        return _after_empty_block(prompt, whole, content, head, (opening, closing))
    if whole.startswith(prompt):
        return _without_opening(whole[len(prompt) :], opening, prompt)
    body = whole[len(head) :]
    if body.lstrip().startswith(opening):
        return _without_opening(body, opening, prompt)
    if closing in body:
        return body
    answer = content.rpartition(closing)[2].strip()
    if closing in content and body.lstrip().startswith(answer):  # the template leaves the reasoning of answers out
        end = body.lstrip()[len(answer) :]
        return _without_opening(content.rstrip(), opening, prompt) + end
    raise UsageError(
        f"the chat template begins every answer with {opening}, and this answer has no reasoning; begin the answer "
        f"with {opening}reasoning{closing}, with an empty block ({opening}{closing}), or use a chat template that does "
        f"not open {opening}"
    )


def opened_block(prompt: str) -> tuple[str, bool] | None:
    """The tag that the end of a rendered prompt opens, and whether it closes it at once; None if it opens none."""
    found = _BLOCK.search(prompt)
    return (found["open"] or found["opens"], bool(found["close"] or found["closes"])) if found else None


def _without_opening(text: str, opening: str, prompt: str) -> str:
    """The text without an opening tag that the prompt has already."""
    if not text.lstrip().startswith(opening):
        return text
    text = text.lstrip()[len(opening) :]
    return text.removeprefix("\n") if prompt.endswith("\n") else text


def _after_empty_block(prompt: str, whole: str, content: str, head: str, tags: tuple[str, str]) -> str:
    """What follows a prompt that ends with an empty block."""
    opening, closing = map(re.escape, tags)
    body = whole[len(prompt) :] if whole.startswith(prompt) else whole[len(head) :]
    body = re.sub(rf"^\s*{opening}\s*{closing}\s*", "", body)
    reasoning = re.match(rf"\s*{opening}(.*?){closing}", content, re.DOTALL)
    if body.lstrip().startswith(tags[0]) or (reasoning is not None and reasoning[1].strip()):
        raise UsageError(
            f"the chat template begins every answer with an empty block ({tags[0]}{tags[1]}), and this answer has "
            f"reasoning; remove it from the answer, or use a chat template that opens {tags[0]} without closing it"
        )
    return body
