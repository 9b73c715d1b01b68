"""`gruppo sample`."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gruppo.cli.options import Device, Dtype, Trust
from gruppo.errors import UsageError
from gruppo.utils.paths import not_a_file
from gruppo.utils.progress import visible

if TYPE_CHECKING:
    from gruppo.runs.console import ConsoleProgress
    from gruppo.types import Completion


def sample(
    model: Annotated[
        str, typer.Argument(help="Hub name, model folder, run folder, .gguf file or smollm2-135m-instruct.")
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help='The prompt; "-" reads it from standard input.')
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message before the prompt.")] = None,
    messages: Annotated[
        str | None,
        typer.Option(
            help='A conversation in place of --prompt: a JSON list of messages, a file with one, or "-" for stdin.'
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of completions.")] = 1,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 takes the most likely token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens only; 0 turns it off.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens that add up to this probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Sample tokens with at least this fraction of the most likely token's probability.")
    ] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per completion.")] = 256,
    min_tokens: Annotated[int, typer.Option(help="Minimum tokens per completion.")] = 0,
    stop_text: Annotated[
        list[str] | None, typer.Option("--stop", help="Stop string: the completion ends before it; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Use the prompt as is, without the chat template.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per line: text, token_ids, logprobs, finish_reason.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    engine: Annotated[str, typer.Option(help="What samples, as engine.name in a recipe: native, vllm, …")] = "native",
    trust: Trust = False,
) -> None:
    """Sample completions for a prompt."""
    from gruppo.config.loading import load_recipe

    decoding = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "min_tokens": min_tokens,
        "stop": stop_text or [],
    }  # fmt: skip
    recipe = load_recipe(
        {
            "model": {"name": model, "device": device, "dtype": dtype},
            "engine": {"name": engine},
            "evaluation": {"decoding": decoding},
        }
    )
    assert recipe.evaluation is not None
    content = _content(prompt, system, messages, plain)
    from gruppo.data.loading import checked_rows
    from gruppo.data.tokenization import tokenize_rows
    from gruppo.engines import check_engine
    from gruppo.engines.memory import Free, Sampled, decoding_of, open_engine_within
    from gruppo.evaluation.sets import sampling_params
    from gruppo.models.loading import find_model, load_model
    from gruppo.models.precision import choose_device, choose_dtype
    from gruppo.rollout.sampling import sample_groups
    from gruppo.runs.console import ConsoleProgress
    from gruppo.utils.signals import stop_on_signals

    params = sampling_params(recipe.evaluation.decoding, max_tokens)
    chosen = choose_device(device)
    check_engine(recipe, chosen, choose_dtype(dtype, chosen))
    progress = ConsoleProgress()
    option = "--prompt" if messages is None else "--messages"
    (row,) = checked_rows([{"prompt": content}], option)
    with stop_on_signals(kills=True) as stop, ExitStack() as stack, stop.interruptible():
        source = find_model(model, progress, trust_remote_code=trust)
        content = row["prompt"]
        if isinstance(content, list) and len(content) == 1 and not source.tokenizer.chat_template:
            content = content[0]["content"]  # a base model has no chat template and reads the text alone
        rows = [{"prompt": content}]
        prompts = tokenize_rows(rows, source.tokenizer, source.context, max_tokens, option, source.vocabulary)
        work = Sampled(count, 1, len(prompts[0].token_ids), max_tokens, decoding_of(params), "--max-tokens")
        free = Free.now(recipe.run.memory, chosen, settable=False)
        policy = load_model(source, device, dtype, progress)
        sampler, _ = open_engine_within(free, policy, recipe.engine, [work], stack, progress)
        streams = [[(seed, number) for number in range(count)]]
        (completions,) = sample_groups(sampler, prompts, streams, params, progress, stop)
    for number, completion in enumerate(completions, start=1):
        _show(completion, number if count > 1 else None, as_json, progress)


def _content(prompt: str | None, system: str | None, messages: str | None, plain: bool) -> str | list[dict[str, Any]]:
    """The text or the messages to complete. Raises UsageError if the options contradict each other."""
    if messages is not None:
        if prompt is not None or system is not None or plain:
            raise UsageError("--messages: replaces the whole prompt; leave out --prompt, --system and --plain")
        return _conversation(messages)
    text = sys.stdin.read() if prompt == "-" else "What is 3 + 4?" if prompt is None else prompt
    if plain:
        if system is not None:
            raise UsageError("--system: needs the chat template, which --plain leaves out; remove one of them")
        return text
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


def _conversation(messages: str) -> list[dict[str, Any]]:
    """The messages of the option, a file or standard input. Raises UsageError if they are not a conversation."""
    text = sys.stdin.read() if messages == "-" else messages
    if not text.lstrip().startswith(("[", "{")):
        if found := not_a_file(Path(text)):
            raise UsageError(f"--messages {messages}: is {found}; give a JSON list or the path of a file")
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(
                f"--messages {messages}: cannot be read ({error}); give a JSON list or the path of a file"
            ) from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f'--messages: not valid JSON ({error}); write e.g. [{{"role": "user", "content": "Hi"}}]'
        ) from None
    if not isinstance(content, list) or not content or not all(isinstance(message, dict) for message in content):
        raise UsageError(
            "--messages: must be a list of messages with role and content; "
            'write e.g. [{"role": "user", "content": "Hi"}]'
        )
    return list(content)


def _show(completion: Completion, number: int | None, as_json: bool, progress: ConsoleProgress) -> None:
    if as_json:
        content = {
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "token_ids": completion.token_ids,
            "logprobs": completion.sampling_logprobs,
        }
        typer.echo(json.dumps(content))
        return
    if number is not None:
        total = sum(completion.sampling_logprobs)
        progress.result(
            f"--- {number} ({len(completion.token_ids)} tokens, {completion.finish_reason}, "
            f"log-probability {total:.2f})"
        )
    typer.echo(visible(completion.text))
