"""`gruppo show`, `export`, `reproduce` and `rerun-reward`: commands for run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gruppo.cli.options import Trust, TrustCode, require_consent
from gruppo.errors import UsageError


def show(
    run: Annotated[Path, typer.Argument(help="The run folder, e.g. runs/quickstart, of a run that goes on or ended.")],
) -> None:
    """Show a run on one screen: its state, its curves, its last warnings and what to do next."""
    from gruppo.runs.console import ConsoleProgress
    from gruppo.runs.screen import show as described

    ConsoleProgress().result(described(run))


def export(
    run: Annotated[Path, typer.Argument(help="The run folder, e.g. runs/quickstart.")],
    to: Annotated[
        Path | None, typer.Option("--to", help="Folder to write; must be empty or not exist yet. Optional with --push.")
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="last, best (highest held-out accuracy), or a step number.")] = "last",
    dtype: Annotated[
        str, typer.Option(help="Dtype of the weights: float32 or bfloat16, with --gguf also float16 or q8_0.")
    ] = "float32",
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of a weight file, e.g. 500MB.")] = "5GB",
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write only the adapter of a run with [model.lora], in peft's format.")
    ] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Write one GGUF file for llama.cpp and Ollama, with a Modelfile.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Evaluate what was written, and fail if it answers unlike the run.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload to this repository of the Hugging Face hub.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: create the repository as a private one.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="With --push: the branch to upload to.")] = None,
    trust_code: TrustCode = False,
    trust: Trust = False,
) -> None:
    """Export a checkpoint as a Hugging Face model folder, and upload it with --push.

    The folder has weights, tokenizer, generation config and model card. Adapters of a run with [model.lora] are merged
    into the model. --gguf writes a GGUF file instead. --verify runs the run's own evaluation on what was written; exit
    code 1 if the difference leaves its paired 95% interval.
    """
    from gruppo.runs.console import ConsoleProgress
    from gruppo.training.export import export as write_folder

    if verify:
        from gruppo.training.verify import code_to_run

        require_consent(run, code_to_run(run), trust_code)
    progress = ConsoleProgress()
    options: dict[str, Any] = {
        "checkpoint": checkpoint,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "adapter": adapter,
        "gguf": gguf,
        "verify": verify,
        "trust": True,  # asked above
        "trust_remote_code": trust,
        "progress": progress,
    }
    if push is not None:
        from gruppo.training.hub_push import push_to_hub

        pushed = push_to_hub(run, push, private=private, revision=revision, to=to, **options)
        exported, place = pushed.exported, f"{pushed.url} ({'private' if pushed.private else 'public'})"
    else:
        if given := "--private" if private else "--revision" if revision is not None else "":
            raise UsageError(
                f"{given}: describes an upload; name the repository with --push OWNER/NAME, or leave it out"
            )
        if to is None:
            raise UsageError("--to: missing; name the folder to write, or a repository with --push OWNER/NAME")
        exported = write_folder(run, to, **options)
        place = str(exported.path)
    accuracy = "" if exported.accuracy is None else f", held-out accuracy {exported.accuracy:.1%}"
    progress.result(
        f"step {exported.step}{accuracy}: {exported.files} files, {exported.bytes / 1e6:,.0f} MB of {dtype} in {place}"
    )
    if exported.verification is not None:
        progress.result(f"verified: {exported.verification}")


def rerun_reward_(
    source: Annotated[Path, typer.Argument(help="A file in the failures/ folder of a run, or a run folder.")],
    step: Annotated[int | None, typer.Option(help="With a run folder: the step of the call, from 1.")] = None,
    group: Annotated[int | None, typer.Option(help="With a run folder: the number of the group, from 0.")] = None,
    reward: Annotated[
        str | None, typer.Option(help="With a run folder: the name of the reward, if there are several.")
    ] = None,
    function: Annotated[
        str | None,
        typer.Option(help="Call this function, named as in reward.functions, in place of the recorded one."),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.01, help="Time limit in seconds. Default: that of the run.")
    ] = None,
    trust: TrustCode = False,
) -> None:
    """Rerun a reward call with the same arguments: a saved one that failed, or any call that a run has recorded.

    This runs the function that the file or the run names, or --function. Prints the output of the reward function and
    one line per completion with its reward. Exit code 1 if it fails.
    """
    import tempfile

    from gruppo.rollout.reward_failures import find_call, rerun_reward, run_of
    from gruppo.runs.console import ConsoleProgress
    from gruppo.runs.trust import code_of_call

    call = find_call(source, step, group, reward)
    if function is None:
        require_consent(source, code_of_call(run_of(source), call), trust)
    progress = ConsoleProgress()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "rewards.log"
        rewards = rerun_reward(source, function, timeout, log, step=step, group=group, reward=reward, trust=True)
        if log.is_file():
            progress.note(log.read_text(encoding="utf-8", errors="replace").rstrip())
    recorded = call.get("recorded", [])
    for number, one in enumerate(rewards):
        outcome = one.failure or ("None" if one.total is None else f"{one.total:g}")
        steps = "".join(f", steps {list(scores.rewards)}" for scores in one.steps.values())
        before = recorded[number] if number < len(recorded) else one.total
        was = "" if before == one.total else f" (recorded: {before})"
        progress.result(f"completion {number}: {outcome}{steps}{was}")
    if any(one.failure for one in rewards):
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
