"""`gruppo export`, `reproduce` and `rerun-reward`: commands for run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gruppo.cli.options import Trust, TrustCode, require_consent


def export(
    run: Annotated[Path, typer.Argument(help="The run folder, e.g. runs/quickstart.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to write; must be empty or not exist yet.")],
    checkpoint: Annotated[str, typer.Option(help="last, best (highest held-out accuracy), or a step number.")] = "last",
    dtype: Annotated[str, typer.Option(help="Dtype of the weights: float32 or bfloat16.")] = "float32",
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of a weight file, e.g. 500MB.")] = "5GB",
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write only the adapter of a run with [model.lora], in peft's format.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Export a checkpoint as a Hugging Face model folder.

    The folder has weights, tokenizer, generation config and model card. Adapters of a run with [model.lora] are merged
    into the model.
    """
    from gruppo.runs.console import ConsoleProgress
    from gruppo.training.export import export as write_folder

    progress = ConsoleProgress()
    exported = write_folder(
        run,
        to,
        checkpoint=checkpoint,
        dtype=dtype,
        max_shard_size=max_shard_size,
        adapter=adapter,
        trust_remote_code=trust,
        progress=progress,
    )
    accuracy = "" if exported.accuracy is None else f", held-out accuracy {exported.accuracy:.1%}"
    progress.result(
        f"step {exported.step}{accuracy}: {exported.files} files, {exported.bytes / 1e6:,.0f} MB of {dtype} in "
        f"{exported.path}",
    )


def rerun_reward_(
    file: Annotated[Path, typer.Argument(help="A file in the failures/ folder of a run.")],
    function: Annotated[
        str | None,
        typer.Option(help="Call this function, named as in reward.functions, in place of the one in the file."),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.01, help="Time limit in seconds. Default: that of the run.")
    ] = None,
    trust: TrustCode = False,
) -> None:
    """Rerun a failed reward call with the same arguments.

    This runs the function that the file names, or --function. Prints the output of the reward function and one line per
    completion with its reward. Exit code 1 if it fails again.
    """
    import tempfile

    from gruppo.rollout.reward_failures import read_call, rerun_reward
    from gruppo.runs.console import ConsoleProgress
    from gruppo.runs.trust import code_of_call

    if function is None:
        require_consent(file, code_of_call(file, read_call(file)), trust)
    progress = ConsoleProgress()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "rewards.log"
        rewards = rerun_reward(file, function, timeout, log, trust=True)
        if log.is_file():
            progress.note(log.read_text(encoding="utf-8", errors="replace").rstrip())
    for number, reward in enumerate(rewards):
        outcome = reward.failure or ("None" if reward.total is None else f"{reward.total:g}")
        steps = "".join(f", steps {list(scores.rewards)}" for scores in reward.steps.values())
        progress.result(f"completion {number}: {outcome}{steps}")
    if any(reward.failure for reward in rewards):
        raise typer.Exit(1)


def reproduce(
    run: Annotated[Path, typer.Argument(help="The run folder, e.g. runs/quickstart; it is not changed.")],
    step: Annotated[int, typer.Option(help="Number of the step to reproduce, from 1.")],
    tolerance: Annotated[
        float, typer.Option(help="Relative difference that counts as equal, e.g. 1e-4 on a different machine.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with every difference.")] = False,
    trust: TrustCode = False,
) -> None:
    """Reproduce a step from its stored rollouts.

    This runs the code that the run's recipe names. Compares rewards, advantages, loss and gradient norm with the stored
    ones. Exit code 0 if all are equal, 1 if any differs.
    """
    from gruppo.runs.console import ConsoleProgress
    from gruppo.training.reproduce import code_to_run, describe_reproduction
    from gruppo.training.reproduce import reproduce as reproduce_step

    require_consent(run, code_to_run(run), trust)
    progress = ConsoleProgress()
    reproduction = reproduce_step(run, step, tolerance=tolerance, trust=True, progress=progress)
    if as_json:
        import json

        typer.echo(json.dumps(reproduction.as_dict()))
    else:
        progress.output.print(describe_reproduction(reproduction), markup=False)
    if not reproduction.equal:
        raise typer.Exit(1)
