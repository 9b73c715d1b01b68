"""`gruppo export`, `reproduce` and `rerun-reward`: what run folders hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gruppo.cli.options import Trust


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
    from gruppo.runs.console import ConsoleProgress
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

    from gruppo.rollout.reward_failures import rerun_reward
    from gruppo.runs.console import ConsoleProgress

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
    from gruppo.runs.console import ConsoleProgress
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
