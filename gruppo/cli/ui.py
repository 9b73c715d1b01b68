"""`gruppo ui`: the dashboard, and `gruppo report`: its pages as one file."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from gruppo.utils.imports import needing_ui


def ui(
    folder: Annotated[
        Path, typer.Argument(help="A folder with runs in it, or one run; default: runs, else this folder.")
    ] = Path("runs"),
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port; by default the first free one from 8642.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but the default is open to other machines.")
    ] = "127.0.0.1",
    open_: Annotated[bool, typer.Option("--open", help="Also open the page in a browser.")] = False,
) -> None:
    """Show runs in a browser: curves, groups, every token, evaluations, live while they run."""
    with needing_ui("the dashboard"):
        from gruppo.ui.server import serve

    def tell(link: str, warning: str) -> None:
        if warning:
            typer.secho(f"Warning: {warning}", err=True, fg="yellow")
        typer.echo(f"Runs in {chosen}: {link}\nStop with Ctrl-C.")
        if open_:
            webbrowser.open(link)

    chosen = Path() if folder == Path("runs") and not folder.exists() else folder
    serve(chosen, host, port, tell)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, e.g. runs/quickstart; several are also compared.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("report.html"),
    steps: Annotated[
        int, typer.Option(help="Steps of each run that have a page: first, last, best, others evenly spaced.")
    ] = 12,
    groups: Annotated[int, typer.Option(help="Groups of each of these steps that are shown token by token.")] = 8,
    questions: Annotated[int, typer.Option(help="Questions of each run that are shown through time.")] = 40,
    megabytes: Annotated[
        float, typer.Option(help="Megabytes of tokens in the file; what does not fit is left out.")
    ] = 20,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is not a report.")] = False,
) -> None:
    """Write runs as one file that opens in a browser without a network: the pages of `gruppo ui`.

    Large runs are sampled down. The page "About this file" says what was left out, and by which rule.
    """
    from gruppo.runs.console import ConsoleProgress

    with needing_ui("a report"):
        from gruppo.ui.report import write_report
        from gruppo.ui.sampling import Limits

    progress = ConsoleProgress()
    limits = Limits(steps, groups, questions, megabytes)
    written = write_report(runs, out, limits, force=force, progress=progress)
    progress.result(f"{written.path}: {written.size / 1e6:.1f} MB, opens in a browser without a network")
    for text in filter(None, written.left_out):
        progress.note(text)
