"""`asyncds config`."""

from pathlib import Path
from typing import Any

import click

from asyncds.cli.opening import Folder, as_json, print_json, print_table
from asyncds.errors import ConfigurationError

__all__ = ["config"]


@click.command()
@click.option("--concurrency", help="Instead of the variable.")
@click.option("--cache-dir", type=Folder(path_type=Path), help="Instead of the variable.")
@click.option("--cache-size", help="Instead of the variable.")
@as_json
def config(as_json: bool, **arguments: Any) -> None:
    """Show every setting, where its value comes from, and which server follows.

    Options are as for warm: what is shown is what holds with them. Secrets are not shown.
    """
    from asyncds.settings import Settings
    from asyncds.store import Connection

    settings = Settings(**{name: value for name, value in arguments.items() if value is not None})
    rows = settings.explained()
    server = dict.fromkeys(("endpoint", "region", "credentials", "error"))
    try:
        connection = Connection.resolve(settings)
        server |= {name: getattr(connection, name) for name in ("endpoint", "region", "credentials")}
    except ConfigurationError as error:
        server["error"] = str(error)
    if as_json:
        print_json({"settings": [row._asdict() for row in rows], "server": server})
        return
    print_table(
        ["variable", "value", "comes from"],
        [[" or ".join(row.variables), _text(row.value), row.origin] for row in rows],
    )
    found = f"{server['endpoint'] or 'AWS'}, credentials: {server['credentials']}"
    click.echo(f"server: {found if server['error'] is None else 'none: ' + server['error']}")


def _text(value: object) -> str:
    """As a variable would be written."""
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
