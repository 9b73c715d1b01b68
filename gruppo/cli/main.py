"""The command line. torch is imported only where something is computed, so that --help and a wrong recipe are quick.

Exit codes: 0 done, 1 failed, 2 bad usage or bad recipe, 130 interrupted after saving; a second SIGINT or SIGTERM kills
(130 or 143 in a shell).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gruppo import __version__
from gruppo.errors import RunError, UsageError
from gruppo.utils.progress import visible

if TYPE_CHECKING:
    from gruppo.cli.console import ConsoleProgress
    from gruppo.runs.results import Result

app = typer.Typer(
    name="gruppo",
    help="Train language models with Group Relative Policy Optimization (arXiv 2402.03300).",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a TOML file; see recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a field of the recipe; may be repeated."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto: cuda, then mps, then cpu.")]
Dtype = Annotated[str, typer.Option(help="Precision of products: float32, bfloat16, or auto: bfloat16 where quick.")]


Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python files that come with the model; read them first.")
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"gruppo {__version__}")
        raise typer.Exit


@app.command()
def train(
    recipe: RecipeFile,
    set_: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. By default runs/<name of the recipe>.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder; start it where there is none.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print the recipe with every default and its meaning; train nothing.")
    ] = False,
) -> None:
    """Train a model as a recipe says.

    Ctrl-C saves and stops; a second Ctrl-C stops at once.
    """
    from gruppo.config.loading import load_recipe

    settings = load_recipe(recipe, set_ or [])
    if show:
        from gruppo.config.schema import annotated

        typer.echo(visible(annotated(settings)), nl=False)
        return
    folder = out if out is not None else Path("runs") / settings.run.name
    from gruppo.cli.console import ConsoleProgress

    progress = ConsoleProgress()
    progress.note(f"gruppo {__version__}: {recipe} -> {folder}")
    import gruppo

    with _resumable(["train", recipe], set_, folder):
        result = gruppo.train(settings, out=folder, resume=resume, progress=progress)
        if result.summary["state"] == "interrupted":
            from gruppo.utils.signals import Interrupted

            step, steps = result.summary["steps"], settings.run.steps
            raise Interrupted(f"Interrupted after step {step} of {steps}; everything is saved. Go on with:")
    _show_result(progress, result)


@contextmanager
def _resumable(command: Sequence[object], set_: Sequence[str] | None, folder: Path) -> Iterator[None]:
    """Signals are heeded in the block, and an end before its time says by which command to go on."""
    from gruppo.runs.atomic import WriteError
    from gruppo.utils.signals import Interrupted, stop_on_signals

    changes = [part for each in set_ or [] for part in ("--set", each)]
    again = shlex.join(["gruppo", *map(str, command), *changes, "--out", str(folder), "--resume"])
    try:
        with stop_on_signals(kills=True):
            yield
    except Interrupted as end:
        begun = str(end) or "Interrupted; what was done before is saved. Go on with:"
        sys.stderr.write(f"{begun}\n  {again}\n")
        raise typer.Exit(130) from None
    except WriteError as error:
        raise RunError(f"{error}; make room, and go on with: {again}") from error


@app.command()
def check(
    recipe: RecipeFile,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, in bytes and seconds.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Sample nothing: no completions, rewards or signals.")] = False,
    seconds: Annotated[
        float, typer.Option(help="Most seconds for sampling a trial, and as many for its rewards.")
    ] = 60.0,
) -> None:
    """Say what a recipe will take (memory by part, time a step and in all), and what is wrong with it.

    Nothing is trained or written. Exit code 0 without a problem, 1 with one, 2 for what training refuses.
    """
    from gruppo.config.loading import load_recipe
    from gruppo.preflight.check import check_recipe, describe_check

    settings = load_recipe(recipe, set_ or [])
    from gruppo.cli.console import ConsoleProgress

    progress = ConsoleProgress()
    found = check_recipe(settings, quick=quick, seconds=seconds, progress=progress)
    if as_json:
        import json

        typer.echo(json.dumps(found.as_dict()))
    else:
        progress.result(describe_check(found))
    if found.problems:
        raise typer.Exit(1)


@app.command("eval")
def eval_(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub name, folder, .gguf file, smollm2-135m-instruct; or a folder that --out wrote."),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Another model, or a folder that --out wrote: differences, paired by question.")
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="Grade the completions of this file (.jsonl, .parquet, …) in place of a model's."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Take [evaluation] and [[benchmarks]] of this recipe; what is given here goes before them."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A task as in a recipe's task.name, e.g. gsm8k or a file; may be repeated. Default: arithmetic."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder or file where the tasks' data are, in place of the Hugging Face hub.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the tasks; may be repeated.")
    ] = None,
    questions: Annotated[int | None, typer.Option(help="Questions of a task at the most. By default all.")] = None,
    samples: Annotated[int | None, typer.Option(help="Answers a question; several need a --temperature.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0, the default, takes the likeliest token.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens at which an answer is cut. By default 256.")] = None,
    grader: Annotated[
        str | None,
        typer.Option(help="number, choice, math, exact_match, … or package.module:function. Default: the task's."),
    ] = None,
    environment: Annotated[
        str | None,
        typer.Option(
            help='What answers are written with: "python" (in a sandbox; of itself with --option prompt=tool), a class.'
        ),
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="A reward model that scores the answers: best-of-k and a weighted vote.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Any field of the recipe, e.g. run.seed=1."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write: samples.parquet, results.json, events.jsonl.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in the folder.")] = False,
    curves: Annotated[
        Path | None, typer.Option(help="Draw pass@k and maj@k into this .svg, .png or .pdf file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of the table.")] = False,
) -> None:
    """Measure a model on tasks, greedily by default, with 95 % intervals over questions.

    With several samples: pass@k, maj@k, and best-of-k by a reward model. Or grade answers that come from elsewhere.
    """
    from gruppo.cli.evaluate import EvalArguments, evaluate_command

    if compare is not None and answers is not None:
        raise UsageError(
            "--answers: are compared once they are graded: write --out, then gruppo eval FOLDER --compare …"
        )
    if (model is None) == (answers is None):
        raise UsageError("give a model, or --answers FILE with completions that are to be graded")
    if curves is not None and (curves.suffix not in {".svg", ".png", ".pdf"} or not curves.absolute().parent.is_dir()):
        raise UsageError(f"--curves {curves}: give the name of an .svg, .png or .pdf file in a folder that exists")
    fields = {"questions": questions, "samples": samples, "max_tokens": max_tokens, "grader": grader}
    asked = EvalArguments(
        recipe=recipe,
        tasks=task or [],
        data=data,
        options=dict(_option(each) for each in option or []),
        fields={name: value for name, value in fields.items() if value is not None},
        temperature=temperature,
        reward_model=reward_model,
        environment=environment,
        overrides=set_ or [],
        model={"device": device, "dtype": dtype, "trust_remote_code": trust},
    )
    from gruppo.cli.console import ConsoleProgress

    evaluate_command(asked, model, compare, answers, out, resume, curves, as_json, ConsoleProgress())


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="Hub name, folder, .gguf file, or smollm2-135m-instruct.")],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help='The prompt; "-" reads it from standard input.')
    ] = "What is 3 + 4?",
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Completions to sample.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from this many likeliest tokens only; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that have this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Only tokens with this share of the likeliest one's probability.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens at which a completion is cut.")] = 256,
    min_tokens: Annotated[int, typer.Option(help="Tokens before which a completion cannot end.")] = 0,
    stop_text: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides the completions.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Give the text as it stands, without chat template.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object a line: text, token_ids, logprobs, finish_reason.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
) -> None:
    """Sample completions of a prompt."""
    from gruppo.config.loading import load_recipe

    decoding = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "min_tokens": min_tokens,
        "stop": stop_text or [],
    }  # fmt: skip
    asked = load_recipe(
        {"model": {"name": model, "device": device, "dtype": dtype}, "evaluation": {"decoding": decoding}}
    ).evaluation
    assert asked is not None
    text = sys.stdin.read() if prompt == "-" else prompt
    from gruppo.cli.console import ConsoleProgress
    from gruppo.data.loading import checked_rows
    from gruppo.data.tokenization import tokenize_rows
    from gruppo.engines import build_engine
    from gruppo.engines.native.engine import choose_slots
    from gruppo.evaluation.sets import sampling_options
    from gruppo.models.loading import find_model, load_model
    from gruppo.models.precision import choose_device, choose_dtype
    from gruppo.rollout.sampling import sample_groups
    from gruppo.utils.signals import stop_on_signals

    options = sampling_options(asked.decoding, max_tokens)
    choose_dtype(dtype, choose_device(device))
    progress = ConsoleProgress()
    with stop_on_signals(kills=True) as stop, stop.interruptible():
        source = find_model(model, progress, trust_remote_code=trust)
        chat = bool(source.tokenizer.chat_template) and not plain
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": text}] if chat else text}
        rows = checked_rows([row], "--prompt")
        prompts = tokenize_rows(rows, source.tokenizer, source.context, max_tokens, "--prompt", source.vocabulary)
        policy = load_model(source, device, dtype, progress)
        engine = build_engine(policy, choose_slots(policy, len(prompts[0].token_ids), max_tokens, count))
        streams = [[(seed, number) for number in range(count)]]
        (completions,) = sample_groups(engine, prompts, streams, options, progress, stop)
    for number, completion in enumerate(completions, start=1):
        if as_json:
            import json

            typer.echo(
                json.dumps(
                    {
                        "text": completion.text,
                        "finish_reason": completion.finish_reason,
                        "token_ids": completion.token_ids,
                        "logprobs": completion.sampling_logprobs,
                    }
                )
            )
            continue
        if count > 1:
            total = sum(completion.sampling_logprobs)
            progress.result(
                f"--- {number} ({len(completion.token_ids)} tokens, {completion.finish_reason}, log-probability "
                f"{total:.2f})"
            )
        typer.echo(visible(completion.text))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The run folder, e.g. runs/quickstart.")],
    to: Annotated[Path, typer.Option("--to", help="The folder to write; it must not exist, or be empty.")],
    checkpoint: Annotated[
        str, typer.Option(help="last, best (of held-out accuracy), or the number of a step.")
    ] = "last",
    dtype: Annotated[str, typer.Option(help="Of the weights written: float32 or bfloat16.")] = "float32",
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights, e.g. 500MB.")] = "5GB",
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a run with [model.lora]: the adapter alone, in peft's format.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder: weights, tokenizer, generation config and model card.

    Adapters of a run with [model.lora] are merged into its model.
    """
    from gruppo.cli.console import ConsoleProgress
    from gruppo.training.export import export as write

    progress = ConsoleProgress()
    made = write(
        run,
        to,
        checkpoint=checkpoint,
        dtype=dtype,
        max_shard_size=max_shard_size,
        adapter=adapter,
        trust_remote_code=trust,
        progress=progress,
    )
    accuracy = "" if made.accuracy is None else f", held-out accuracy {made.accuracy:.1%}"
    progress.result(
        f"step {made.step}{accuracy}: {made.files} files, {made.bytes / 1e6:,.0f} MB of {dtype} in {made.path}",
    )


@app.command()
def label(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option(help="Folder of the labels.")],
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the labels in the folder.")] = False,
) -> None:
    """Sample completions and label them by rule, each step too (Math-Shepherd); [reward_model] says how.

    The labels are Parquet files in OUT/labels, a row a completion.
    """
    from gruppo.config.loading import load_recipe

    settings = load_recipe(recipe, set_ or [])
    from gruppo.cli.console import ConsoleProgress
    from gruppo.training.reward_model_api import label as make

    progress = ConsoleProgress()
    with _resumable(["label", recipe], set_, out):
        made = make(settings, out=out, resume=resume, progress=progress)
    steps = "" if made.soft is None else f"; {made.steps} steps, right from {made.soft:.1%} of their ends"
    progress.result(f"{made.completions} completions, {made.right:.1%} right{steps}: {made.path / 'labels'}")


@app.command("reward-model")
def reward_model(
    recipe: RecipeFile,
    labels: Annotated[Path, typer.Argument(help="Folder that gruppo label wrote, or that of a run.")],
    out: Annotated[Path, typer.Option(help="Folder of the result.")],
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training in the folder.")] = False,
) -> None:
    """Train the recipe's [reward_model] on labels; the result is in OUT/model, for transformers or for a recipe."""
    from gruppo.config.loading import load_recipe

    settings = load_recipe(recipe, set_ or [])
    from gruppo.cli.console import ConsoleProgress
    from gruppo.training.reward_model_api import train_reward_model

    progress = ConsoleProgress()
    with _resumable(["reward-model", recipe, labels], set_, out):
        made = train_reward_model(settings, labels, out=out, resume=resume, progress=progress)
    progress.result(f"{made.updates} updates; held-out figures before and after, {made.path / 'model'}:")
    for name in sorted({*made.before, *made.after}):
        pair = ["-" if each is None else f"{each:.3f}" for each in (made.before.get(name), made.after.get(name))]
        progress.result(f"  {name:<18} {pair[0]:>9} -> {pair[1]:>9}")


@app.command("rerun-reward")
def rerun_reward_(
    file: Annotated[Path, typer.Argument(help="A file of a run's failures/.")],
    function: Annotated[
        str | None,
        typer.Option(help="Call this function, as in reward.functions, and not the one that the file names."),
    ] = None,
    timeout: Annotated[float | None, typer.Option(min=0.01, help="Seconds. By default those of the run.")] = None,
) -> None:
    """Call a reward again as it was called when it failed. This runs the code that the file names.

    Prints what the reward prints and gives, a line a completion. Exit code 1 where it fails again.
    """
    import tempfile

    from gruppo.cli.console import ConsoleProgress
    from gruppo.rollout.reward_failures import rerun_reward

    progress = ConsoleProgress()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "rewards.log"
        rewards = rerun_reward(file, function, timeout, log)
        if log.is_file():
            progress.note(log.read_text(encoding="utf-8", errors="replace").rstrip())
    for number, reward in enumerate(rewards):
        given = reward.failure or ("None" if reward.total is None else f"{reward.total:g}")
        steps = "".join(f", steps {list(each.rewards)}" for each in reward.steps.values())
        progress.result(f"completion {number}: {given}{steps}")
    if any(reward.failure for reward in rewards):
        raise typer.Exit(1)


@app.command()
def reproduce(
    run: Annotated[Path, typer.Argument(help="The run folder, e.g. runs/quickstart; it is only read.")],
    step: Annotated[int, typer.Option(help="The step to make again, from 1.")],
    tolerance: Annotated[
        float, typer.Option(help="Relative difference up to which numbers are equal; for another machine, e.g. 1e-4.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, with every difference.")] = False,
) -> None:
    """Make a step again from its stored rollouts, and compare rewards, advantages, loss and gradient norm.

    Exit code 0 where all is equal, 1 where something differs.
    """
    from gruppo.cli.console import ConsoleProgress
    from gruppo.training.reproduce import describe_reproduction
    from gruppo.training.reproduce import reproduce as make

    progress = ConsoleProgress()
    made = make(run, step, tolerance=tolerance, progress=progress)
    if as_json:
        import json

        typer.echo(json.dumps(made.as_dict()))
    else:
        progress.output.print(describe_reproduction(made), markup=False)
    if not made.equal:
        raise typer.Exit(1)


@app.command()
def methods() -> None:
    """Print the table of methods: data source, reward, signal on a token, loss, equation."""
    from gruppo.config.methods import describe_methods

    typer.echo(describe_methods())


@app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/recipe.md instead: every field with its meaning.")
    ] = False,
) -> None:
    """Print the JSON schema of recipes, by which TOML editors complete and check them."""
    import json

    from gruppo.config import schema as described

    if markdown:
        typer.echo(described.markdown(), nl=False)
    else:
        typer.echo(json.dumps(described.json_schema(), indent=2, ensure_ascii=False))


def main() -> None:
    """Run the command line and exit with its code."""
    from gruppo.utils.signals import Interrupted, exit_on_signals

    exit_on_signals()
    try:
        app()
    except UsageError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except Interrupted:
        _fail("interrupted", 130)
    except OSError as error:
        _fail(f"{type(error).__name__}: {error}; what was saved before is intact", 1)


def _fail(message: str, code: int) -> None:
    for line in message.splitlines():
        sys.stderr.write(f"gruppo: {visible(line)}\n")
    sys.exit(code)


def _option(text: str) -> tuple[str, Any]:
    from gruppo.config.loading import toml_value

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--option {text}: not of the form name=value; write e.g. --option maximum=20")
    return name.strip(), toml_value(value)


def _show_result(progress: ConsoleProgress, result: Result) -> None:
    """The summary that ends a run, from the run folder alone."""
    from gruppo.runs.report import describe_run

    progress.result(describe_run(result.path, result.summary, result.metrics))


if __name__ == "__main__":
    main()
