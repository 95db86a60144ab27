"""`shorttail init`: makes a folder to start from."""

from __future__ import annotations

import contextlib
import os
import shlex
from importlib import resources
from pathlib import Path
from typing import Final

import click

from shorttail.errors import InvalidArgument

TEMPLATES: Final = ["churn", "fraud", "ranking", "blank"]


@click.command()
@click.argument("name")
@click.option(
    "--template",
    type=click.Choice(TEMPLATES),
    show_default="NAME if it is one of them, else churn",
    help="churn: one view and a model; fraud: two views, request columns and an on-demand function; ranking: a user"
    " and many items; blank: one view and no model.",
)
def init(name: str, template: str | None) -> None:
    """Make the folder NAME with definitions, scripts that make data and train a model, a test and a README.

    The README leads in five commands from the data to a server. NAME may be an empty folder, such as `.`;
    files that exist are never changed.

    \b
    Example:
      shorttail init fraud
      shorttail init payments --template fraud
    """
    if template is None:
        template = Path(name).name if Path(name).name in TEMPLATES else TEMPLATES[0]
    texts = read_template(template)
    make_folder(name, texts)
    click.echo(f"{name}: {', '.join(texts)} (template {template})")
    first = next(line for line in texts["README.md"].splitlines() if line.startswith("$ "))
    click.echo(f"next: cd {shlex.quote(name)} && {first[2:]}")


def read_template(template: str) -> dict[str, str]:
    """Return {file name: text} of a template. Installers put compiled files beside the scripts; they are no part."""
    folder = resources.files("shorttail") / "templates" / template
    return {item.name: item.read_text("utf-8") for item in sorted(folder.iterdir(), key=str) if item.is_file()}


def make_folder(name: str, texts: dict[str, str]) -> None:
    """Make the folder, or take an empty one, and write the files into it. A failure leaves no file behind.

    Raises InvalidArgument.
    """
    if not name.isprintable() or name[:1] in ("", "-"):
        raise InvalidArgument(f"{name!r} is not the name of a folder; write for example: shorttail init churn")
    folder, made = Path(name), list[Path]()
    try:
        if not folder.is_dir():
            folder.mkdir()
            made.append(folder)
        elif any(folder.iterdir()):
            raise InvalidArgument(f"{name}: the folder is not empty; choose another name")
        for file, text in texts.items():
            with (folder / file).open("x", encoding="utf-8") as output:  # another process may write here too
                made.append(folder / file)
                output.write(text)
    except BaseException as error:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir() if path == folder else path.unlink()
        if isinstance(error, OSError):
            raise InvalidArgument(f"{name}: the folder cannot be made: {os.strerror(error.errno or 0)}") from None
        raise
