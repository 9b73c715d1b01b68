"""`gruppo eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gruppo.cli.options import Device, Dtype, Trust, named_option
from gruppo.errors import UsageError


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
    if compare is not None and answers is not None:
        raise UsageError(
            "--answers: are compared once they are graded: write --out, then gruppo eval FOLDER --compare …"
        )
    if (model is None) == (answers is None):
        raise UsageError("give a model, or --answers FILE with completions that are to be graded")
    if curves is not None and (curves.suffix not in {".svg", ".png", ".pdf"} or not curves.absolute().parent.is_dir()):
        raise UsageError(f"--curves {curves}: give the name of an .svg, .png or .pdf file in a folder that exists")
    fields = {"questions": questions, "samples": samples, "max_tokens": max_tokens, "grader": grader}
    from gruppo.cli.eval_arguments import EvalArguments, evaluate_command

    is_run = (
        model is not None and (Path(model) / "recipe.toml").is_file() and not (Path(model) / "folder.json").exists()
    )
    if recipe is None and not task and model is not None and is_run:
        recipe = Path(model) / "recipe.toml"  # of a run: its own evaluation
    asked = EvalArguments(
        recipe=recipe,
        tasks=task or [],
        data=data,
        options=dict(named_option(each) for each in option or []),
        fields={name: value for name, value in fields.items() if value is not None},
        temperature=temperature,
        reward_model=reward_model,
        environment=environment,
        overrides=set_ or [],
        model={"device": device, "dtype": dtype, "trust_remote_code": trust},
    )
    from gruppo.runs.console import ConsoleProgress

    evaluate_command(asked, model, compare, answers, out, resume, curves, as_json, ConsoleProgress())
