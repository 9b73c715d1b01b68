"""`gruppo ui`: the dashboard, and `gruppo report`: its pages as one file."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from gruppo.errors import UsageError


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
    serve = _server()

    def tell(link: str, warning: str) -> None:
        if warning:
            typer.secho(f"Warning: {warning}", err=True, fg="yellow")
        typer.echo(f"Runs in {chosen}: {link}\nStop with Ctrl-C.")
        if open_:
            webbrowser.open(link)

    chosen = Path() if folder == Path("runs") and not folder.exists() else folder
    serve(chosen, host, port, tell)


def _server() -> Callable[[Path, str, int | None, Callable[[str, str], None]], None]:
    try:
        from gruppo.ui.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "gruppo":
            raise
        raise UsageError(f'{error.name}: is not installed; the dashboard needs: pip install "gruppo[ui]"') from None
    return serve
