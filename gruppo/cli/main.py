"""The command line. torch is imported only by commands that compute, so that --help and recipe errors are fast.

Exit codes: 0 done, 1 failed, 2 bad usage or bad recipe, 130 interrupted after saving. A second SIGINT or SIGTERM kills
the process (130 or 143 in a shell).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from gruppo import __version__
from gruppo.cli import convert, evaluate, export, plan, rescore, reward_model, sample, study, train, ui
from gruppo.cli.options import Command
from gruppo.config.renames import COMMANDS
from gruppo.errors import RunError, UsageError, speak_command_line
from gruppo.utils.progress import visible

app = typer.Typer(
    name="gruppo",
    help="Train language models with Group Relative Policy Optimization (arXiv 2402.03300).",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"gruppo {__version__}")
        raise typer.Exit


_COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.train,
    "convert": convert.convert,
    "check": train.check,
    "plan": plan.plan,
    "eval": evaluate.eval_,
    "study": study.study,
    "sample": sample.sample,
    "show": export.show,
    "ui": ui.ui,
    "report": ui.report,
    "export": export.export,
    "label": reward_model.label,
    "reward-model": reward_model.reward_model,
    "rerun-reward": export.rerun_reward_,
    "rescore": rescore.rescore,
    "reproduce": export.reproduce,
    "recipes": train.recipes,
    "methods": train.methods,
    "schema": train.schema,
}
for name, function in _COMMANDS.items():
    app.command(name, cls=convert.Arguments if name == "convert" else Command)(function)


def main() -> None:
    """Run the command line and exit with its exit code."""
    from gruppo.utils.signals import Interrupted, exit_on_signals

    exit_on_signals()
    speak_command_line()
    try:
        command = sys.argv[1] if len(sys.argv) > 1 else ""
        if command in COMMANDS:
            raise UsageError(f"command {command}: was renamed; write gruppo {COMMANDS[command]}")
        app()
    except UsageError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except Interrupted:
        _fail("interrupted", 130)
    except OSError as error:
        _fail(f"{type(error).__name__}: {error}; everything that was saved before is intact", 1)


def _fail(message: str, code: int) -> None:
    for line in message.splitlines():
        sys.stderr.write(f"gruppo: {visible(line)}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
