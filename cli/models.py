"""``kvpilot models``: the learned side, from data to what steers."""

from __future__ import annotations

import typer

from cli.collect import collect

models_app = typer.Typer(no_args_is_help=True, help="Learn to steer: collect data, on your own texts if you like.")
models_app.command("collect")(collect)
