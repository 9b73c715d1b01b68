"""`gruppo study`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gruppo.utils.progress import visible

if TYPE_CHECKING:
    from gruppo.runs.console import ConsoleProgress
    from gruppo.study.arms import Study
    from gruppo.study.report import Report


def study(
    file: Annotated[Path, typer.Argument(help="The TOML file of a study; see docs/studies.md.")],
    plan: Annotated[bool, typer.Option("--plan", help="Show what is left and how long it takes, and exit.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write the page from what is there, and exit.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete the folders of runs whose results are recorded, and exit.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="ARM", help="Only this arm, and what it begins with; may be repeated.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Begin nothing that would take longer than what is left of these minutes.")
    ] = None,
) -> None:
    """Run what is missing of a study: arms × seeds, their evaluations, figures and a page.

    The same command continues a study. Ctrl-C saves the run and stops; a second Ctrl-C stops immediately. Exit code 0
    if everything is done, 1 if something failed or is left.
    """
    from gruppo.errors import UsageError

    if plan and report:
        raise UsageError("--plan: only shows what is left, so it cannot be combined with --report; leave one out")
    if prune and (plan or report):
        raise UsageError(f"--prune: only deletes folders; leave out {'--plan' if plan else '--report'}")
    if only and report:
        raise UsageError(f"--only {only[0]}: the page of --report holds all arms; leave one of them out")
    if minutes is not None and not minutes > 0:
        raise UsageError(f"--minutes {minutes:g}: must be more than 0; write e.g. --minutes 60")
    if minutes is not None and (other := "--plan" * plan or "--report" * report or "--prune" * prune):
        raise UsageError(f"--minutes {minutes:g}: {other} trains nothing; leave one of them out")
    from gruppo.runs.console import ConsoleProgress
    from gruppo.study.arms import load_study

    loaded, progress = load_study(file), ConsoleProgress()
    if plan:
        from gruppo.study.plan import describe_plan
        from gruppo.utils.signals import stop_on_signals

        with stop_on_signals(kills=True):
            progress.result(visible(describe_plan(loaded, only or [], progress)))
    elif report:
        _report(loaded, progress)
    elif prune:
        from gruppo.study.prune import prune as prune_study

        for line in prune_study(loaded, only or []):
            progress.result(visible(line))
    else:
        _run(loaded, only or [], minutes, progress)


def _report(study: Study, progress: ConsoleProgress) -> Report:
    from gruppo.study.report import write_report

    written = write_report(study)
    for remark in written.remarks:
        progress.note(visible(remark))
    for found in written.content["questions"]:
        progress.result(visible(f"{found['id']}: {found['text']}\n  {found['answer']}"))
    progress.result(f"{written.page}, {written.json}")
    return written


def _run(study: Study, only: list[str], minutes: float | None, progress: ConsoleProgress) -> None:
    from gruppo.study.plan import describe_plan
    from gruppo.study.runner import StudyRunner
    from gruppo.utils.signals import Interrupted, stop_on_signals

    progress.note(visible(describe_plan(study, only, progress, checks=False)))
    interrupted = False
    with stop_on_signals(kills=True) as stop:
        runner = StudyRunner(study, progress, stop, minutes, only)
        try:
            outcome = runner.run()
        except Interrupted:
            interrupted, outcome = True, runner.outcome
    _report(study, progress)
    if interrupted:
        sys.stderr.write("Interrupted; everything done so far is saved. The same command continues.\n")
        raise typer.Exit(130 if stop.signal is not None else 1)
    for name, why in outcome.failed.items():
        progress.note(visible(f"{name} failed: {why}"))
    if outcome.left:
        raise typer.Exit(1)
