"""The command line. A module for each command, which imports what it needs when it runs; torch by the demo only."""

import contextlib
import io
import os
import signal
import sys
import warnings

import click

from asyncds import __version__
from asyncds.cli.config import config
from asyncds.cli.demo import demo
from asyncds.cli.holdings import clear, ls, stats
from asyncds.cli.tune import tune
from asyncds.cli.verify import verify
from asyncds.cli.warm import warm
from asyncds.errors import AsyncdsError
from asyncds.progress import one_line

__all__ = ["main"]

_INTERRUPTED = 128 + signal.SIGINT


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="asyncds")
def _commands() -> None:
    """Async, cached datasets for PyTorch, from S3 and MinIO."""


for _command in (warm, tune, ls, stats, verify, clear, config, demo):
    _commands.add_command(_command)


def _show(message: Warning | str, *_: object) -> None:
    click.echo(f"warning: {one_line(f'{message}')}", err=True)


def _tell(error: click.ClickException) -> None:
    """In one line, but for help that was asked for by saying nothing."""
    text = error.format_message()
    is_help = isinstance(error, click.exceptions.NoArgsIsHelpError)
    click.echo(text if is_help else f"error: {one_line(text)}", err=True)


def main() -> None:
    """Run a command. Errors and warnings of asyncds become one line each on standard error, and an exit code."""
    warnings.showwarning = _show  # type: ignore[assignment]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # keys have letters that not every terminal has
            stream.reconfigure(errors="backslashreplace")
    try:
        _commands.main(prog_name="asyncds", standalone_mode=False)
    except AsyncdsError as error:
        click.echo(f"error: {one_line(str(error))}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _tell(error)
        sys.exit(error.exit_code)
    except OSError as error:  # of the output, above all: `click` sees to a pipe that is closed
        click.echo(f"error: {one_line(str(error))}", err=True)
        with contextlib.suppress(OSError, ValueError):  # what is still to be written has no place, at the end, either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(_INTERRUPTED)
