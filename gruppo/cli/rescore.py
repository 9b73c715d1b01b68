"""`gruppo rescore`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gruppo.cli.options import Overrides
from gruppo.errors import UsageError, one_line

if TYPE_CHECKING:
    from gruppo.runs.agreement import Agreement
    from gruppo.runs.rescores import Rescores

_SHOWN = 10  # disagreements and groups
_WIDTH = 160  # characters of a text, about two lines


def rescore(
    run: Annotated[Path, typer.Argument(help="The run folder, e.g. runs/quickstart; it is not changed.")],
    reward: Annotated[
        list[str],
        typer.Option(
            help='The reward, named as in reward.functions, e.g. exact_match or "short = my.py:f"; may repeat.'
        ),
    ],
    set_: Overrides = None,
    against: Annotated[
        str | None, typer.Option(help="Compare with this part of the recorded reward. Default: its total.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option("--steps", "--step", metavar="A-B", help="Steps to score: 3-9, or one. Default: all.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Score at most so many groups, spread evenly over the steps. Default: all.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A .parquet file to write every row with both values to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of the text.")] = False,
) -> None:
    """Score the saved completions of a run with another reward, and compare it with the recorded one.

    Shows how well the two agree, in which groups the order of the completions changes, and the largest disagreements.
    --set changes fields of [reward], e.g. reward.weights=[1,0.5] or reward.timeout=60. The run's own reward is not run.
    """
    import json

    from gruppo.rollout.rescore import rescore as score
    from gruppo.runs.console import ConsoleProgress
    from gruppo.utils.signals import stop_on_signals

    progress, chosen = ConsoleProgress(), None if steps is None else _steps(steps)
    with stop_on_signals(kills=True):
        rescores = score(
            run,
            reward,
            overrides=set_ or [],
            against=against,
            steps=chosen,
            limit=limit,
            out=out,
            progress=progress,
        )
    if as_json:
        found, groups = rescores.disagreements(_SHOWN), rescores.changed_groups()[:_SHOWN]
        tables = {"disagreements": found, "changed_groups": groups}
        listed = {
            name: json.loads(frame.to_json(orient="records", double_precision=15)) for name, frame in tables.items()
        }
        typer.echo(json.dumps(rescores.as_dict() | listed))
        return
    progress.result("\n".join(describe(rescores)))
    if out is not None:
        progress.note(f"{len(rescores.table)} rows: {out}")


def _steps(text: str) -> range:
    """The steps of "3-9" or "3". Raises UsageError."""
    match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", text.strip(), re.ASCII)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise UsageError(f"--steps {text}: must be a step or a range of steps; write e.g. --steps 3-9")
    return range(first, last + 1)


def describe(rescores: Rescores) -> list[str]:
    """The comparison as lines of text."""
    names = ("recorded" if rescores.against is None else f"recorded {rescores.against}", rescores.reward)
    figures = rescores.group_figures()
    return [
        f"{rescores.path}: {len(rescores.table):,} completions in {figures['groups']:,} groups, scored with {names[1]}",
        *(f"  Note: {note}" for note in rescores.notes),
        f"  compared           {rescores.agreement.count:,}",
        f"  excluded           {_excluded(rescores.excluded())}",
        *(f"    {count:,} times: {one_line(why)}" for why, count in rescores.failures()),
        *_agreement(rescores.agreement, names),
        *_groups(rescores, figures, names),
        *_disagreements(rescores, names),
    ]


def _excluded(counts: Mapping[str, int]) -> str:
    """How many completions are not compared, and why."""
    words = {"recorded": "without a recorded reward", "rescored": "without a new one", "both": "without either"}
    listed = [f"{count:,} {words[name]}" for name, count in counts.items() if count]
    return ", ".join(listed) or "none"


def _agreement(found: Agreement, names: tuple[str, str]) -> Iterator[str]:
    if found.equal is None or found.means is None or found.difference is None:
        yield "  Nothing can be compared."
        return
    yield f"  mean reward        {names[0]} {found.means[0]:.4g}, {names[1]} {found.means[1]:.4g}"
    yield f"  equal              {found.equal:.1%}; mean absolute difference {found.difference:.4g}"
    correlations = [("Pearson", found.pearson), ("Spearman", found.spearman)]
    shown = ", ".join(f"{name} {value:.3f}" for name, value in correlations if value is not None)
    yield f"  correlation        {shown or 'not defined: one of the rewards is constant'}"
    if found.table is not None:
        kappa = "not defined: all rewards are the same" if found.kappa is None else f"{found.kappa:.3f}"
        yield f"  Cohen's kappa      {kappa}"
        for old, row in enumerate(found.table):
            counts = ", ".join(f"{names[1]} {new}: {count:,}" for new, count in enumerate(row))
            yield f"    {names[0]} {old}:  {counts}"


def _groups(rescores: Rescores, figures: Mapping[str, int], names: tuple[str, str]) -> Iterator[str]:
    whole = figures["groups"]
    yield "Groups"
    yield (
        f"  nonzero advantage  {names[0]} {figures['recorded_nonzero']:,}, {names[1]} "
        f"{figures['rescored_nonzero']:,} of {whole:,}: {figures['gain_nonzero']:,} gain it, "
        f"{figures['lose_nonzero']:,} lose it"
    )
    yield f"  order changes      in {figures['reordered']:,} of {whole:,}"
    if figures["ordered_pairs"]:
        pairs = f"{figures['swapped_pairs']:,} of {figures['ordered_pairs']:,}"
        yield f"  opposite order     {pairs} pairs that both rewards order"
    for row in rescores.changed_groups()[:_SHOWN].to_dict("records"):
        yield (
            f"  step {row['step']}, group {row['group']} ({one_line(row['prompt_id'])}): {row['changed']} of "
            f"{row['pairs']} pairs change, {row['signs']} of {row['completions']} advantages change sign"
        )


def _disagreements(rescores: Rescores, names: tuple[str, str]) -> Iterator[str]:
    rows = rescores.disagreements(_SHOWN).to_dict("records")
    yield "Disagreements, the largest first" if rows else "No disagreements"
    for row in rows:
        yield (
            f"  step {row['step']}, group {row['group']}, completion {row['completion']} "
            f"({one_line(row['prompt_id'])}): {names[0]} {row['recorded']:.4g}, {names[1]} {row['rescored']:.4g}"
        )
        yield from _texts(row)


def _texts(row: Mapping[str, Any]) -> Iterator[str]:
    """The prompt, the reference and the completion of a row, shortened."""
    from gruppo.rollout.recorded_rows import prompt_of
    from gruppo.runs.reading import reading

    if row["text"] is None:
        yield "    (its text is no longer in the run)"
        return
    with reading(Path(f"step {row['step']}"), "restore its table from a copy"):
        prompt = prompt_of(dict(row))
    yield f"    prompt: {_short(prompt.text)}"
    if "answer" in prompt.columns:
        yield f"    answer: {_short(prompt.columns['answer'])}"
    yield f"    {_short(row['text'])}"


def _short(value: Any) -> str:
    """A value as one printable line: its beginning and its end if it is long."""
    text = one_line(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH // 3]} … {text[-(_WIDTH - _WIDTH // 3) :]}"
