"""What can be seen of a recipe without sampling: findings on its fields, the tokenizer and its chat template, the
lengths of prompts, and questions that are both trained on and asked."""

from __future__ import annotations

import re
import statistics
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from gruppo.config.recipe import Recipe
from gruppo.data.offline import OfflineCompletions
from gruppo.data.transform import prompt_text
from gruppo.models.policy import LanguageModel
from gruppo.preflight.findings import Finding
from gruppo.types import Message, Prompt

_ANSWER = "Kiwi seven."  # stands for what the assistant says
_THOUGHT = "<think>\nPlum.\n</think>\n\n" + _ANSWER
_ENDS = re.compile(r"[\"'.,;:!?’”)\]]+(?=\s|$)|(?:(?<=\s)|^)[\"'‘“(\[]+")


def inspect_recipe(recipe: Recipe) -> list[Finding]:
    """Fields that agree with each other and yet come to nothing."""
    run, sampling, method = recipe.run, recipe.sampling, recipe.method
    found = []
    compared = method.source != "dataset" and method.baseline == "group" and method.credit == "completion"
    if compared and sampling.group_size == 1:
        found.append(Finding(
            "problem", "recipe", "sampling.group_size = 1: each completion is its group's mean",
            "every advantage is 0, and nothing is learned",
            'write group_size = 2 or more, or method.baseline = "batch"',
        ))  # fmt: skip
    weights = recipe.reward.weights
    if weights and not any(weights) and recipe.reward_model is None:
        found.append(Finding(
            "problem", "recipe", f"reward.weights = {weights}: every reward counts for nothing",
            "all rewards are 0, and nothing is learned", "write a weight other than 0",
        ))  # fmt: skip
    if not recipe.optimizer.learning_rate:
        found.append(Finding(
            "warning", "recipe", "optimizer.learning_rate = 0", "the policy stays as it is", "write e.g. 1e-6",
        ))  # fmt: skip
    if recipe.evaluation is None:
        found.append(Finding(
            "note", "recipe", "there is no [evaluation]",
            "a reward that rises does not say that the model gets better at what you want",
            "write [evaluation] with questions that are not trained on",
        ))  # fmt: skip
    each = (
        f"{sampling.prompts_per_step} rows" if method.source == "dataset"
        else f"{sampling.prompts_per_step} questions x {sampling.group_size} completions of at most "
        f"{sampling.max_tokens} tokens"
    )  # fmt: skip
    return [Finding("ok", "recipe", f"{method.name}: {run.steps} steps of {each}"), *found]


def inspect_model(policy: LanguageModel, dtype: str) -> list[Finding]:
    """Whose numbers these are, and whether all of them are numbers."""
    import torch

    count = sum(each.numel() for each in policy.model.parameters())
    trained = sum(each.numel() for each in policy.model.parameters() if each.requires_grad)
    bad = [name for name, each in policy.model.named_parameters() if not bool(torch.isfinite(each).all())]
    if bad:
        return [Finding(
            "problem", "model", f"{len(bad)} tensors hold numbers that are not finite ({bad[0]})",
            "every log-probability is NaN", "load whole weights of another copy of the model",
        )]  # fmt: skip
    some = "" if trained == count else f", of which {trained / 1e6:,.1f} million are trained"
    context = f"a context of {policy.context:,} tokens" if policy.context < 2**31 else "no limit to its context"
    what = f"{policy.model.config.model_type}, {count / 1e6:,.1f} million weights{some}; {dtype} products, {context}"
    return [Finding("ok", "model", what, figures={"weights": count, "trained": trained})]


def inspect_tokens(policy: LanguageModel) -> list[Finding]:
    """The tokens that end a completion, that fill up, and that the model does not know."""
    tokenizer, ends = policy.tokenizer, list(policy.eos_ids)
    known = int(policy.model.config.get_text_config().vocab_size)
    found = []
    if not ends:
        found.append(Finding(
            "problem", "end of turns", "neither the model's configs nor the tokenizer name an end token (eos_token_id)",
            "no completion ends by itself; each is cut at max_tokens",
            "set eos_token_id in the model's generation_config.json",
        ))  # fmt: skip
    elif all(each >= known for each in ends):
        found.append(Finding(
            "problem", "end of turns", f"the end tokens {ends} are beyond the model's {known} tokens",
            "the model cannot emit them: no completion ends by itself",
            "take the tokenizer that belongs to the model, or set eos_token_id in its generation_config.json",
        ))  # fmt: skip
    else:
        names = ", ".join(f"{_shown(tokenizer, each)} ({each})" for each in ends)
        several = f"{len(ends)} end tokens, each of which ends a completion: " if len(ends) > 1 else "end token: "
        found.append(Finding("ok", "end of turns", several + names, figures={"eos_ids": ends}))
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id in ends:
        found.append(Finding(
            "ok", "padding", f"the padding token is the end token {_shown(tokenizer, tokenizer.pad_token_id)}: "
            "harmless here, as masks come from lengths and nothing is padded",
        ))  # fmt: skip
    if len(tokenizer) > known:
        found.append(Finding(
            "warning", "tokenizer", f"it has {len(tokenizer)} tokens, and the model knows {known}",
            "a prompt that holds one of the others is refused", "take the tokenizer that belongs to the model",
            {"tokenizer": len(tokenizer), "model": known},
        ))  # fmt: skip
    return found


def _shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return repr(str(tokenizer.decode([token]))) if token < len(tokenizer) else "unknown"


def inspect_start(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt]) -> list[Finding]:
    """Whether prompts begin with BOS once, where the model has one that it is used to."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    seen = [prompt.token_ids for prompt in prompts]
    twice = sum(ids[:2] == (bos, bos) for ids in seen)
    without = sum(ids[0] != bos for ids in seen)
    name = _shown(tokenizer, bos)
    if twice:
        return [Finding(
            "problem", "start of prompts", f"{twice} of {len(seen)} prompts begin with BOS ({name}) twice",
            "the model has not seen that in its training, and answers worse",
            "take BOS out of the chat template or out of the rows' text, as the tokenizer adds it",
            {"prompts": len(seen), "twice": twice},
        )]  # fmt: skip
    begins = list(tokenizer("a")["input_ids"])[:1] == [bos]
    if without and begins:
        return [Finding(
            "warning", "start of prompts", f"{without} of {len(seen)} prompts do not begin with BOS ({name}), which "
            "the tokenizer puts before plain text", "most models that have a BOS answer worse without it",
            "put {{ bos_token }} at the start of the chat template", {"prompts": len(seen), "without": without},
        )]  # fmt: skip
    what = f"BOS ({name}) stands once at the start of each prompt" if not without else "no BOS is added to plain text"
    return [Finding("ok", "start of prompts", what)]


def inspect_template(policy: LanguageModel, prompts: Sequence[Prompt]) -> list[Finding]:
    """Whether the chat template asks for an answer, ends it with an end token, and leaves earlier turns alone.

    It is tried on the first conversation of the prompts, with an answer made up.
    """
    chats = [prompt.content for prompt in prompts if not isinstance(prompt.content, str)]
    plain = len(prompts) - len(chats)
    found = []
    if plain and policy.tokenizer.chat_template:
        found.append(Finding(
            "note", "chat template", f"{plain} of {len(prompts)} prompts are plain text, which the model reads as it "
            "stands", "a chat model answers worse outside of its template",
            'write task.system = "" to make conversations of them, unless this is meant',
        ))  # fmt: skip
    elif plain:
        found.append(Finding("ok", "chat template", "prompts are plain text, and the tokenizer has no chat template"))
    if not chats:
        return found
    messages = [each for each in chats[0] if each["role"] != "assistant"]
    try:
        return [*found, *_turns(policy, messages, any(_answered(chat) for chat in chats))]
    except Exception as error:  # noqa: BLE001  a chat template is a program of the model's
        what = f"it fails on a conversation with an answer ({type(error).__name__}: {error})"
        why = "whether a turn ends with an end token cannot be seen"
        return [*found, Finding("note", "chat template", what[:300], why)]


def _answered(messages: Sequence[Message]) -> bool:
    return any(each["role"] == "assistant" for each in messages[:-1])


def _turns(policy: LanguageModel, messages: list[Message], answered: bool) -> list[Finding]:
    tokenizer = policy.tokenizer

    def rendered(*more: Message, ask: bool = False) -> str:
        return str(tokenizer.apply_chat_template([*messages, *more], add_generation_prompt=ask, tokenize=False))

    answer: Message = {"role": "assistant", "content": _ANSWER}
    asked, bare, whole = rendered(ask=True), rendered(), rendered(answer)
    if _ANSWER not in whole:
        return [Finding(
            "problem", "chat template", "it leaves out what the assistant says",
            "the model is not shown answers as it gives them", "take the chat template that belongs to the model",
        )]  # fmt: skip
    before, _, after = whole.rpartition(_ANSWER)
    return [
        _asking(asked, bare, before),
        _ending(policy, after),
        *_earlier(rendered, answered),
    ]


def _asking(asked: str, bare: str, before: str) -> Finding:
    """Whether the prompt ends where the assistant's answer begins."""
    if asked == bare and before != bare:
        header = before.removeprefix(bare)[-40:]
        return Finding(
            "problem", "generation prompt", "the chat template gives the same with and without a generation prompt, "
            f"though an answer begins with {header!r}", "the model goes on with the user's turn instead of answering",
            "put {% if add_generation_prompt %}" + header.replace("\n", "\\n") + "{% endif %} at its end",
        )  # fmt: skip
    if before != asked and not before.startswith(asked):
        return Finding(
            "note", "generation prompt", f"prompts end with {asked[-30:]!r}, and earlier answers in a conversation "
            f"begin after {before[-30:]!r}", "the model answers from another place than a conversation shows",
            "nothing, if the model was trained so (some think only in their last turn)",
        )  # fmt: skip
    return Finding("ok", "generation prompt", f"prompts end with {asked[-30:]!r}, where an answer begins")


def _ending(policy: LanguageModel, after: str) -> Finding:
    """Whether the assistant's turn ends with a token that ends a completion."""
    tokenizer = policy.tokenizer
    ids = list(tokenizer(after, add_special_tokens=False)["input_ids"]) if after else []
    if any(each in policy.eos_ids for each in ids):
        end = next(each for each in ids if each in policy.eos_ids)
        return Finding("ok", "end of answers", f"the chat template ends an answer with {_shown(tokenizer, end)}")
    special = [each for each in ids if each in tokenizer.all_special_ids or each in tokenizer.added_tokens_decoder]
    how = f"with {after[:30]!r}, which is" if after.strip() else "with nothing, so with"
    return Finding(
        "problem" if special else "warning", "end of answers",
        f"the chat template ends an answer {how} {'no end token' if after.strip() else 'no end token either'} "
        f"(end tokens: {list(policy.eos_ids)})",
        "a model that was taught to end its turns so goes on after them, and is cut at max_tokens",
        f"add {special[0]} to eos_token_id in the model's generation_config.json" if special
        else "let the template end the assistant's turn with the end token, if the model was trained so",
        {"ends_with": after, "eos_ids": list(policy.eos_ids)},
    )  # fmt: skip


def _earlier(rendered: Any, answered: bool) -> list[Finding]:
    """Whether a conversation that goes on leaves what is there already."""
    on: Message = {"role": "user", "content": "And then?"}
    for content in (_ANSWER, _THOUGHT):
        answer: Message = {"role": "assistant", "content": content}
        first = rendered(answer)
        if not rendered(answer, on).startswith(first.rstrip()):
            return [Finding(
                "warning" if answered else "note", "earlier turns",
                "the chat template writes an earlier answer anew when the conversation goes on"
                + (" (with <think>)" if content == _THOUGHT else ""),
                "in conversations of several answers the model reads other tokens than it wrote",
                "give one row for each answer" if answered else "nothing, as long as prompts hold one question each",
            )]  # fmt: skip
    return []


def inspect_lengths(
    prompts: Sequence[Prompt], limit: int, max_tokens: int, left_out: Mapping[str, int], refused: str | None
) -> Finding:
    """How long prompts are beside what the context leaves. `left_out`: too long ones by task; `refused`: what training
    says of them, where the recipe does not filter."""
    lengths = sorted(len(prompt.token_ids) for prompt in prompts)
    gone = sum(left_out.values())
    median, most = round(statistics.median(lengths)), lengths[-1]
    high = lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]
    figures = {
        "prompts": len(lengths), "min": lengths[0], "median": median, "p95": high, "max": most, "limit": limit,
        "too_long": gone,
    }  # fmt: skip
    told = f"{len(lengths)} prompts of {lengths[0]} to {most} tokens, half of them below {median + 1}, 95 % below "
    told += f"{high + 1}; the limit is {limit}" if limit < 2**30 else f"{high + 1}"
    whole = len(lengths) + gone
    if refused:
        return Finding(
            "problem", "prompts", f"{gone} of {whole} rows are over the limit; {told}",
            f"training refuses them: {refused}",
            'write overlong = "filter" in [task], lower sampling.max_tokens, or shorten the prompts', figures,
        )  # fmt: skip
    if gone:
        return Finding(
            "warning", "prompts", f"{gone} of {whole} rows are left out as too long; {told}",
            "the model learns from the short ones alone",
            f"raise max_prompt_tokens, or lower sampling.max_tokens = {max_tokens}", figures,
        )  # fmt: skip
    return Finding("ok", "prompts", told, figures=figures)


def inspect_given(given: Mapping[str, OfflineCompletions], max_tokens: int) -> list[Finding]:
    """How long the completions are that rows bring."""
    lengths = sorted(len(completion.token_ids) for each in given.values() for completion, _ in each)
    if not lengths:
        return []
    what = f"rows bring {len(lengths)} of {lengths[0]} to {lengths[-1]} tokens, half of them below "
    figures = {"completions": len(lengths), "max": lengths[-1], "max_tokens": max_tokens}
    text = f"{what}{round(statistics.median(lengths)) + 1}; the limit is {max_tokens}"
    return [Finding("ok", "completions", text, figures=figures)]


def inspect_overlap(prompts: Iterable[Prompt], questions: Sequence[Prompt]) -> list[Finding]:
    """Questions of the evaluation that are trained on too, word for word or but for case, space and punctuation."""
    if not questions:
        return []
    exact: dict[str, Prompt] = {}
    alike: dict[str, Prompt] = {}
    for prompt in prompts:
        exact.setdefault(prompt_text({"prompt": prompt.content}), prompt)
        alike.setdefault(_normalised(prompt), prompt)
    same = [each for each in questions if prompt_text({"prompt": each.content}) in exact]
    near = [each for each in questions if each not in same and _normalised(each) in alike]
    figures = {"questions": len(questions), "exact": len(same), "normalised": len(near)}
    if not same and not near:
        what = f"none of the {len(questions)} questions of the evaluation is among the prompts"
        return [Finding("ok", "overlap", what, figures=figures)]
    example = (same or near)[0]
    other = alike[_normalised(example)] if not same else exact[prompt_text({"prompt": example.content})]
    return [Finding(
        "warning", "overlap", f"of the {len(questions)} questions of the evaluation {len(same)} are trained on as they "
        f"stand, and {len(near)} but for case, space and punctuation; e.g. {example.id}, {example.text[:60]!r}, is "
        f"{other.id}", "the accuracy shows what was learned by heart",
        "write task.held_out = 0.1, or name other questions with evaluation.task", figures,
    )]  # fmt: skip


def _normalised(prompt: Prompt) -> str:
    """The question without what does not tell two questions apart; signs of mathematics do."""
    content = prompt.content
    parts = [content] if isinstance(content, str) else [
        str(each["content"]) for each in content if each["role"] != "system"
    ]  # fmt: skip
    text = unicodedata.normalize("NFKC", "\n".join(parts)).casefold()
    return " ".join(_ENDS.sub("", text).split())
