"""Checks that need no sampling: recipe fields, model, tokenizer, chat template, prompt lengths, and overlap between
training and evaluation."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from gruppo.config.recipe import Recipe
from gruppo.data.chat_template import asks_for_time, render_chat, unread_options
from gruppo.data.offline import OfflineCompletions
from gruppo.data.transform import prompt_text
from gruppo.models.policy import LanguageModel
from gruppo.preflight.findings import Finding
from gruppo.types import Message, Prompt
from gruppo.utils.text import normalized, text_of_content

_ANSWER = "Kiwi seven."  # a made-up assistant message
_THOUGHT = "<think>\nPlum.\n</think>\n\n" + _ANSWER


def check_fields(recipe: Recipe) -> list[Finding]:
    """Fields that are valid together but train nothing."""
    run, sampling, method = recipe.run, recipe.sampling, recipe.method
    found = []
    compared = method.source != "dataset" and method.baseline == "group" and method.credit == "completion"
    if compared and sampling.group_size == 1:
        found.append(Finding(
            "problem", "recipe", "sampling.group_size = 1: each reward is the mean of its group",
            "every advantage is 0, so nothing is learned",
            'write group_size = 2 or more, or method.baseline = "batch"',
        ))  # fmt: skip
    weights = recipe.reward.weights
    if weights and not any(weights) and recipe.reward_model is None:
        found.append(Finding(
            "problem", "recipe", f"reward.weights = {weights}: all weights are 0",
            "all rewards are 0, so nothing is learned", "write a weight other than 0",
        ))  # fmt: skip
    if not recipe.optimizer.learning_rate:
        found.append(Finding(
            "warning", "recipe", "optimizer.learning_rate = 0", "the policy does not change", "write e.g. 1e-6",
        ))  # fmt: skip
    if recipe.evaluation is None:
        found.append(Finding(
            "note", "recipe", "there is no [evaluation]",
            "a rising reward does not show that the model gets better at what you want",
            "write [evaluation] with questions that are not trained on",
        ))  # fmt: skip
    step = (
        f"{sampling.prompts_per_step} rows" if method.source == "dataset"
        else f"{sampling.prompts_per_step} questions x {sampling.group_size} completions of at most "
        f"{sampling.max_tokens} tokens"
    )  # fmt: skip
    return [Finding("ok", "recipe", f"{method.name}: {run.steps} steps of {step}"), *found]


def check_engine_choice(recipe: Recipe, device: str, has_vllm: bool) -> list[Finding]:
    """Whether the native engine samples on a GPU. `has_vllm`: vLLM is installed."""
    if recipe.engine.name != "native" or device != "cuda" or recipe.method.source == "dataset":
        return []
    install = "" if has_vllm else 'run: pip install "gruppo[vllm]"; then '
    return [Finding(
        "note", "engine", 'engine.name = "native" on a GPU',
        "it computes one token at a time without CUDA graphs; vLLM is much faster there",
        f'{install}write engine.name = "vllm" (see docs/vllm.md)',
    )]  # fmt: skip


def check_lag(recipe: Recipe) -> list[Finding]:
    """Whether sampling ahead has a device of its own."""
    if recipe.cluster is None or not recipe.lag or recipe.cluster.engines or recipe.engine.name != "native":
        return []
    return [Finding(
        "note", "lag", f"cluster.lag = {recipe.lag} with the native engine: it samples on the device that trains",
        "only rewards and environments run beside training; sampling and training slow each other down",
        'write engine.name = "vllm" with a device of its own, or lag = 0',
    )]  # fmt: skip


def check_model(policy: LanguageModel, dtype: str) -> list[Finding]:
    """Architecture, number of weights and compute dtype, and matrices that are all zeros."""
    count = sum(weight.numel() for weight in policy.model.parameters())
    trained = sum(weight.numel() for weight in policy.model.parameters() if weight.requires_grad)
    part = "" if trained == count else f", {trained / 1e6:,.1f} million of them trained"
    context = f"a context of {policy.context:,} tokens" if policy.context < 2**31 else "an unlimited context"
    what = f"{policy.model.config.model_type}, {count / 1e6:,.1f} million weights{part}; {dtype} matmuls, {context}"
    found = [Finding("ok", "model", what, figures={"weights": count, "trained": trained})]
    matrices = {name: weight for name, weight in policy.model.named_parameters() if weight.ndim > 1}
    if zeros := [name for name, weight in matrices.items() if "lora_" not in name and not bool(weight.any())]:
        found.append(Finding(
            "warning", "weights", f"{len(zeros)} of {len(matrices)} matrices contain only zeros (first: {zeros[0]})",
            "the file may be damaged, and the layer does nothing",
            "compare the files with their source, unless the model was made this way",
        ))  # fmt: skip
    return found


def check_end_tokens(policy: LanguageModel) -> list[Finding]:
    """EOS tokens, the padding token, and the vocabulary sizes of tokenizer and model."""
    tokenizer, ends = policy.tokenizer, list(policy.eos_ids)
    known = int(policy.model.config.get_text_config().vocab_size)
    found = []
    if not ends:
        found.append(Finding(
            "problem", "EOS tokens", "neither the model's configs nor the tokenizer define an EOS token (eos_token_id)",
            "no completion finishes (EOS); all are truncated at max_tokens",
            "set eos_token_id in the model's generation_config.json",
        ))  # fmt: skip
    elif all(token >= known for token in ends):
        found.append(Finding(
            "problem", "EOS tokens", f"the EOS tokens {ends} are outside the model's vocabulary of {known} tokens",
            "the model cannot emit them, so no completion finishes (EOS)",
            "use the tokenizer that belongs to the model, or set eos_token_id in its generation_config.json",
        ))  # fmt: skip
    else:
        names = ", ".join(f"{_shown(tokenizer, token)} ({token})" for token in ends)
        several = f"{len(ends)} tokens, each of which ends a completion: " if len(ends) > 1 else ""
        found.append(Finding("ok", "EOS tokens", several + names, figures={"eos_ids": ends}))
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id in ends:
        found.append(Finding(
            "ok", "padding", f"the padding token is the EOS token {_shown(tokenizer, tokenizer.pad_token_id)}; "
            "harmless, because gruppo does not pad and masks by length",
        ))  # fmt: skip
    if len(tokenizer) > known:
        found.append(Finding(
            "warning", "tokenizer", f"it has {len(tokenizer)} tokens, but the model's vocabulary only {known}",
            "prompts with one of the other tokens are refused", "use the tokenizer that belongs to the model",
            {"tokenizer": len(tokenizer), "model": known},
        ))  # fmt: skip
    return found


def _shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return repr(str(tokenizer.decode([token]))) if token < len(tokenizer) else "unknown"


def check_bos(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt]) -> list[Finding]:
    """Whether prompts begin with exactly one BOS token, if the tokenizer has one and adds it to plain text."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    all_ids = [prompt.token_ids for prompt in prompts]
    twice = sum(ids[:2] == (bos, bos) for ids in all_ids)
    without = sum(ids[0] != bos for ids in all_ids)
    name = _shown(tokenizer, bos)
    if twice:
        return [Finding(
            "problem", "start of prompts", f"{twice} of {len(all_ids)} prompts begin with two BOS tokens ({name})",
            "the model never saw this in training and answers worse",
            "remove BOS from the chat template or from the rows' text, because the tokenizer adds it",
            {"prompts": len(all_ids), "twice": twice},
        )]  # fmt: skip
    begins = list(tokenizer("a")["input_ids"])[:1] == [bos]
    if without and begins:
        return [Finding(
            "warning", "start of prompts", f"{without} of {len(all_ids)} prompts do not begin with BOS ({name}), "
            "which the tokenizer adds to plain text", "most models with a BOS token answer worse without it",
            "put {{ bos_token }} at the start of the chat template", {"prompts": len(all_ids), "without": without},
        )]  # fmt: skip
    what = f"one BOS token ({name}) in every prompt" if not without else "the tokenizer adds no BOS to plain text"
    return [Finding("ok", "start of prompts", what)]


def check_chat_template(policy: LanguageModel, prompts: Sequence[Prompt]) -> list[Finding]:
    """Whether the chat template opens an answer, ends it with an EOS token, and keeps earlier turns unchanged.

    It is tried on the first conversation of the prompts, with a made-up answer.
    """
    chats = [prompt for prompt in prompts if not isinstance(prompt.content, str)]
    plain = len(prompts) - len(chats)
    found = []
    if plain and policy.tokenizer.chat_template:
        found.append(Finding(
            "note", "chat template", f"{plain} of {len(prompts)} prompts are plain text, which is not rendered with "
            "the chat template", "a chat model answers worse without its template",
            'write task.system = "" to turn them into conversations, unless plain text is intended',
        ))  # fmt: skip
    elif plain:
        found.append(Finding("ok", "chat template", "prompts are plain text; the tokenizer has no chat template"))
    if not chats:
        return found
    found += _option_findings(policy.tokenizer, chats)
    messages = [message for message in _messages(chats[0]) if message["role"] != "assistant"]
    has_answers = any(_has_answer(_messages(chat)) for chat in chats)
    try:
        found += _time_findings(policy.tokenizer, chats[0])
        return [*found, *_template_findings(policy, messages, chats[0].template_options, has_answers)]
    except Exception as error:  # noqa: BLE001  what a template renders may be more than a tokenizer reads
        what = f"it fails on a conversation with an answer ({error})"
        why = "cannot check whether a turn ends with an EOS token"
        return [*found, Finding("note", "chat template", what[:300], why)]


def _messages(prompt: Prompt) -> list[Message]:
    assert not isinstance(prompt.content, str)
    return prompt.content


def _option_findings(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Prompt]) -> list[Finding]:
    """The chat-template options of the prompts, and those that the template never reads."""
    names = sorted({name for prompt in chats for name in prompt.template_options})
    if not names:
        return []
    values = {name: [p.template_options[name] for p in chats if name in p.template_options] for name in names}
    shown = []
    for name, given in values.items():
        if name == "tools":
            tools = dict.fromkeys(_tool_name(tool) for listed in given for tool in listed)
            text = f"tools: {', '.join(tools)}"
        else:
            different = dict.fromkeys(json.dumps(value, default=str, ensure_ascii=False) for value in given)
            text = f"{name} = {' or '.join(list(different)[:3])}{' or …' if len(different) > 3 else ''}"
        shown.append(text if len(given) == len(chats) else f"{text} ({len(given)} of {len(chats)} prompts)")
    found = [Finding("ok", "chat options", "; ".join(shown), figures={"options": names})]
    if unread := unread_options(tokenizer, {name: given[0] for name, given in values.items()}):
        found.append(Finding(
            "warning", "chat options", f"the chat template never reads {', '.join(unread)}",
            "prompts are the same as without", "correct the name, remove it, or use a model whose template reads it",
            {"unread": unread},
        ))  # fmt: skip
    return found


def _tool_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function")
    inner = function if isinstance(function, Mapping) else tool
    return str(inner.get("name") or tool.get("type"))


def _time_findings(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[Finding]:
    if not asks_for_time(tokenizer, _messages(prompt), prompt.template_options):
        return []
    return [Finding(
        "note", "date", "the chat template prints the date or the time",
        "a run keeps those of its start, but another run or a later evaluation gets others",
        "to fix it, pass what the template prints, e.g. task.chat_template_kwargs = {date_string = \"26 Jul 2024\"}, "
        "if the template has such a variable",
    )]  # fmt: skip


def _has_answer(messages: Sequence[Message]) -> bool:
    return any(message["role"] == "assistant" for message in messages[:-1])


def _template_findings(
    policy: LanguageModel, messages: list[Message], options: Mapping[str, Any], has_answers: bool
) -> list[Finding]:
    tokenizer = policy.tokenizer

    def rendered(*more: Message, ask: bool = False) -> str:
        return render_chat(tokenizer, [*messages, *more], options, ask=ask)

    answer: Message = {"role": "assistant", "content": _ANSWER}
    prompt, bare, whole = rendered(ask=True), rendered(), rendered(answer)
    if _ANSWER not in whole:
        return [Finding(
            "problem", "chat template", "it omits what the assistant says",
            "the model does not see earlier answers", "use the chat template that belongs to the model",
        )]  # fmt: skip
    before, _, after = whole.rpartition(_ANSWER)
    return [
        _generation_prompt(prompt, bare, before),
        _answer_end(policy, after),
        *_earlier_turns(rendered, has_answers),
    ]


def _generation_prompt(prompt: str, bare: str, before: str) -> Finding:
    """Whether the prompt ends where the assistant's answer begins.

    `prompt`: rendered with a generation prompt; `bare`: without; `before`: what precedes an answer.
    """
    if prompt == bare and before.rstrip() != bare.rstrip():
        header = before.removeprefix(bare)[-40:]
        return Finding(
            "problem", "generation prompt", "the chat template renders the same with and without a generation prompt, "
            f"but an answer begins with {header!r}", "the model continues the user's turn instead of answering",
            "put {% if add_generation_prompt %}" + header.replace("\n", "\\n") + "{% endif %} at its end",
        )  # fmt: skip
    if before != prompt and not before.startswith(prompt):
        return Finding(
            "note", "generation prompt", f"prompts end with {prompt[-30:]!r}, but earlier answers in a conversation "
            f"begin after {before[-30:]!r}", "the model answers after a different text than in a conversation",
            "nothing, if the model was trained this way (some think only in their last turn)",
        )  # fmt: skip
    return Finding("ok", "generation prompt", f"prompts end with {prompt[-30:]!r}, where an answer begins")


def _answer_end(policy: LanguageModel, after: str) -> Finding:
    """Whether the assistant's turn ends with an EOS token. `after`: what the template puts after an answer."""
    tokenizer = policy.tokenizer
    ids = list(tokenizer(after, add_special_tokens=False)["input_ids"]) if after else []
    if any(token in policy.eos_ids for token in ids):
        end = next(token for token in ids if token in policy.eos_ids)
        return Finding("ok", "end of answers", f"the chat template ends an answer with {_shown(tokenizer, end)}")
    special = [token for token in ids if token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder]
    how = f"ends an answer with {after[:30]!r}, not with" if after.strip() else "ends an answer without"
    return Finding(
        "problem" if special else "warning", "end of answers",
        f"the chat template {how} an EOS token (EOS tokens: {list(policy.eos_ids)})",
        "a model trained on this template does not stop after its turn and is truncated at max_tokens",
        f"add {special[0]} to eos_token_id in the model's generation_config.json" if special
        else "end the assistant's turn with the EOS token in the template, if the model was trained this way",
        {"ends_with": after, "eos_ids": list(policy.eos_ids)},
    )  # fmt: skip


def _earlier_turns(rendered: Any, has_answers: bool) -> list[Finding]:
    """Whether earlier messages are rendered the same when a conversation continues."""
    follow_up: Message = {"role": "user", "content": "And then?"}
    for content in (_ANSWER, _THOUGHT):
        answer: Message = {"role": "assistant", "content": content}
        first = rendered(answer)
        if not rendered(answer, follow_up).startswith(first.rstrip()):
            return [Finding(
                "warning" if has_answers else "note", "earlier turns",
                "the chat template changes an earlier answer when the conversation continues"
                + (" (with <think>)" if content == _THOUGHT else ""),
                "in conversations with several answers, the model reads other tokens than it wrote",
                "write one row per answer" if has_answers else "nothing, as long as every prompt has one question",
            )]  # fmt: skip
    return []


def check_prompt_lengths(
    prompts: Sequence[Prompt], limit: int, max_tokens: int, left_out: Mapping[str, int], refused: str | None
) -> Finding:
    """Prompt lengths compared with the limit.

    `left_out`: number of prompts over the limit, by task. `refused`: training's error message about them, if the recipe
    does not filter.
    """
    lengths = sorted(len(prompt.token_ids) for prompt in prompts)
    too_long = sum(left_out.values())
    median, most = round(statistics.median(lengths)), lengths[-1]
    high = lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]
    figures = {
        "prompts": len(lengths), "min": lengths[0], "median": median, "p95": high, "max": most, "limit": limit,
        "too_long": too_long,
    }  # fmt: skip
    what = f"{len(lengths)} prompts of {lengths[0]} to {most} tokens (median {median}, 95th percentile {high})"
    what += f"; limit {limit}" if limit < 2**30 else ""
    rows = len(lengths) + too_long
    if refused:
        return Finding(
            "problem", "prompts", f"{too_long} of {rows} rows are over the limit; {what}",
            f"training refuses them: {refused}",
            'write overlong = "filter" in [task], lower sampling.max_tokens, or shorten the prompts', figures,
        )  # fmt: skip
    if too_long:
        return Finding(
            "warning", "prompts", f"{too_long} of {rows} rows are too long and left out; {what}",
            "the model learns only from the shorter ones",
            f"raise max_prompt_tokens, or lower sampling.max_tokens = {max_tokens}", figures,
        )  # fmt: skip
    return Finding("ok", "prompts", what, figures=figures)


def check_dataset_completions(completions: Mapping[str, OfflineCompletions], max_tokens: int) -> list[Finding]:
    """Lengths of the completions in the dataset, if it has any."""
    lengths = sorted(len(completion.token_ids) for pairs in completions.values() for completion, _ in pairs)
    if not lengths:
        return []
    figures = {"completions": len(lengths), "max": lengths[-1], "max_tokens": max_tokens}
    what = (
        f"{len(lengths)} in the dataset, of {lengths[0]} to {lengths[-1]} tokens (median "
        f"{round(statistics.median(lengths))}); limit {max_tokens}"
    )
    return [Finding("ok", "completions", what, figures=figures)]


def check_overlap(prompts: Iterable[Prompt], questions: Sequence[Prompt]) -> list[Finding]:
    """Evaluation questions that are also trained on, identical or except for case, whitespace and punctuation."""
    if not questions:
        return []
    exact: dict[str, Prompt] = {}
    similar: dict[str, Prompt] = {}
    for prompt in prompts:
        exact.setdefault(prompt_text({"prompt": prompt.content}), prompt)
        similar.setdefault(_normalized(prompt), prompt)
    same = [question for question in questions if prompt_text({"prompt": question.content}) in exact]
    near = [question for question in questions if question not in same and _normalized(question) in similar]
    figures = {"questions": len(questions), "exact": len(same), "normalised": len(near)}
    if not same and not near:
        what = f"none of the {len(questions)} evaluation questions is trained on"
        return [Finding("ok", "overlap", what, figures=figures)]
    example = (same or near)[0]
    other = similar[_normalized(example)] if not same else exact[prompt_text({"prompt": example.content})]
    return [Finding(
        "warning", "overlap", f"of the {len(questions)} evaluation questions, {len(same)} are also trained on, and "
        f"{len(near)} more differ only in case, whitespace and punctuation; e.g. {example.id}, {example.text[:60]!r}, "
        f"is {other.id}", "the accuracy includes memorized answers",
        "write task.held_out = 0.1, or choose other questions with evaluation.task", figures,
    )]  # fmt: skip


def _normalized(prompt: Prompt) -> str:
    """The question in normal form."""
    content = prompt.content
    parts = [content] if isinstance(content, str) else [
        text_of_content(message["content"]) for message in content if message["role"] != "system"
    ]  # fmt: skip
    return normalized("\n".join(parts))
