"""The root of ``knowlab``: finds the commands, runs one, turns errors into one line and an exit code."""

from __future__ import annotations

import copy
import errno
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

import typer

from lab.errors import ConfigError, KnowLabError

COMMAND_GROUP = "knowlab.commands"

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_HELP = """A laboratory for changing and questioning what a language model knows.

Errors are one line; KNOWLAB_DEBUG=1 shows the traceback behind them."""


def build_app() -> typer.Typer:
    """The whole command tree: built-in commands first, then every app of the entry-point group."""
    app = typer.Typer(
        name="knowlab", help=_HELP, no_args_is_help=True, add_completion=True, rich_markup_mode="markdown"
    )

    @app.callback()
    def root(
        version: bool = typer.Option(
            False, "--version", help="Print the version and stop.", is_eager=True, callback=_print_version
        ),
    ) -> None:
        pass

    from lab.cli import (
        ask,
        atlas,
        audit,
        audit_calibration,
        audit_effects,
        audit_side_effects,
        listing,
        patches,
        tracing,
    )

    groups: dict[str, typer.Typer] = {}
    for part in (
        ask,
        patches,
        tracing,
        audit,
        audit_calibration,
        audit_effects,
        audit_side_effects,
        listing,
        atlas,
    ):
        app.add_typer(_joining(part.app, groups))
    for point in sorted(entry_points(group=COMMAND_GROUP), key=lambda point: point.name):
        try:
            app.add_typer(_joining(point.load(), groups))
        except Exception as error:  # a broken package of somebody else must not take the others down
            if os.environ.get("KNOWLAB_DEBUG"):
                raise
            typer.secho(f"warning: commands of {point.name!r} ({point.value}) do not load: {error}", err=True)
    return app


def _joining(part: typer.Typer, groups: dict[str, typer.Typer]) -> typer.Typer:
    """A copy of ``part`` whose groups join those of the same name that other parts brought before.

    Typer itself would let the later group take the earlier one's place. The parts are the modules' own and stay as they are.
    """
    mine = copy.copy(part)
    mine.registered_commands, mine.registered_groups = list(part.registered_commands), []
    for info in part.registered_groups:
        inner = info.typer_instance
        if inner is None:
            continue
        name = next((each for each in (info.name, inner.info.name) if isinstance(each, str)), None)
        if name in groups:
            groups[name].registered_commands.extend(inner.registered_commands)
            groups[name].registered_groups.extend(inner.registered_groups)
            continue
        own = copy.copy(info)
        if name is None:
            own.typer_instance = _joining(inner, groups)
        else:
            own.typer_instance = groups[name] = copy.copy(inner)
            groups[name].registered_commands = list(inner.registered_commands)
            groups[name].registered_groups = list(inner.registered_groups)
        mine.registered_groups.append(own)
    return mine


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("knowlab"))
        raise typer.Exit


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code.

    Args:
        arguments: Words after ``knowlab``; the process' own when omitted.

    Returns:
        0, or 1 (the work failed), 2 (the command line or a name in it is wrong), 130 (interrupted), or what the
        command chose.
    """
    command = typer.main.get_command(build_app())
    try:
        command(args=None if arguments is None else list(arguments), prog_name="knowlab")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else EXIT_ERROR
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except Exception as error:
        if os.environ.get("KNOWLAB_DEBUG"):
            raise
        typer.echo(f"error: {describe(error)}", err=True)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_ERROR
    return 0


def describe(error: Exception) -> str:
    """One line for an error: the message itself for our own errors, with its kind for all others."""
    text = " ".join(str(error).split())
    # safetensors reports a full disk as an error of its own kind.
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left on device" in text:
        return f"no space left on the disk; what was being written was removed ({text})"
    if isinstance(error, KnowLabError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text} (KNOWLAB_DEBUG=1 shows where)"


if __name__ == "__main__":
    sys.exit(run())
