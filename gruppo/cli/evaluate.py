"""`gruppo eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gruppo.cli.options import Device, Dtype, Trust, TrustCode, named_option
from gruppo.errors import UsageError


def eval_(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hub name, model or run folder, .gguf file, smollm2-135m-instruct, or a folder written by --out."
        ),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Compare with another model, or a folder written by --out, paired by question.")
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="Grade the completions in this file (.jsonl, .parquet, …) instead of a model's."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Use [evaluation] and [[benchmarks]] of this recipe; options given here take precedence."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task, named as in task.name, e.g. gsm8k or a file; may be repeated. Default: arithmetic."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder or file with the data of the tasks, in place of the Hugging Face hub.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Set an option of the tasks; may be repeated.")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COLUMN", help="A column of the tasks, e.g. prompt=question; may be repeated."),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help='Prompt template of the tasks, with column names in braces: "{question} Think."')
    ] = None,
    system: Annotated[
        str | None, typer.Option(help='System message; "" turns text prompts into conversations without one.')
    ] = None,
    questions: Annotated[int | None, typer.Option(help="Maximum questions per task. Default: all.")] = None,
    samples: Annotated[int | None, typer.Option(help="Answers per question; more than 1 needs --temperature.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0, the default, takes the most likely token.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Maximum tokens per answer. Default: 256.")] = None,
    grader: Annotated[
        str | None,
        typer.Option(
            help="numeric_answer, choice, math_answer, exact_match, … or package.module:function. Default: the task's."
        ),
    ] = None,
    environment: Annotated[
        str | None,
        typer.Option(
            help='Environment for the answers: "python" (sandboxed; implied by --option prompt=tool) or a class.'
        ),
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="Reward model that scores the answers, for weighted votes and best-of-k.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.FIELD=VALUE", help="Set a field of the recipe, e.g. run.seed=1; may be repeated."
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    trust_code: TrustCode = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write samples.parquet, results.json and events.jsonl to.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the evaluation in the folder.")] = False,
    curves: Annotated[Path | None, typer.Option(help="Plot pass@k and maj@k to this .svg, .png or .pdf file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of the table.")] = False,
) -> None:
    """Evaluate a model on tasks.

    Reports accuracy with 95% intervals over questions, by default of greedy answers. Several samples add pass@k, maj@k
    and, with --reward-model, best-of-k. --answers grades completions from a file instead.
    """
    if compare is not None and answers is not None:
        raise UsageError(
            "--answers: cannot be combined with --compare; grade with --out FOLDER first, then run "
            "gruppo eval FOLDER --compare …"
        )
    if (model is None) == (answers is None):
        raise UsageError("give either a model or --answers FILE with completions to grade")
    if curves is not None and (curves.suffix not in {".svg", ".png", ".pdf"} or not curves.absolute().parent.is_dir()):
        raise UsageError(f"--curves {curves}: must be an .svg, .png or .pdf file in an existing folder")
    fields = {"questions": questions, "samples": samples, "max_tokens": max_tokens, "grader": grader}
    from gruppo.cli.eval_arguments import EvalArguments, evaluate_command

    is_run = (
        model is not None and (Path(model) / "recipe.toml").is_file() and not (Path(model) / "folder.json").exists()
    )
    if recipe is None and not task and model is not None and is_run:
        recipe = Path(model) / "recipe.toml"  # a run folder: use the evaluation of its recipe
    arguments = EvalArguments(
        recipe=recipe,
        tasks=task or [],
        data=data,
        options=dict(named_option(text) for text in option or []),
        prompts=_prompt_fields(columns or [], template, system),
        fields={name: value for name, value in fields.items() if value is not None},
        temperature=temperature,
        reward_model=reward_model,
        environment=environment,
        overrides=set_ or [],
        model={"device": device, "dtype": dtype, "trust_remote_code": trust},
        trust=trust_code,
    )
    from gruppo.runs.console import ConsoleProgress

    evaluate_command(arguments, model, compare, answers, out, resume, curves, as_json, ConsoleProgress())


def _prompt_fields(columns: list[str], template: str | None, system: str | None) -> dict[str, Any]:
    """The fields of a task that --columns, --template and --system set."""
    names: dict[str, str] = {}
    for text in columns:
        name, equals, column = text.partition("=")
        if not (equals and name and column):
            raise UsageError(f"--columns {text}: must have the form NAME=COLUMN; write e.g. --columns prompt=question")
        names[name] = column
    fields = {"columns": names or None, "template": template, "system": system}
    return {name: value for name, value in fields.items() if value is not None}
