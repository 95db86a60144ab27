"""The `shorttail` command. Its output is an interface: a line for each fact, and `--json` for programs.

Heavy modules are imported inside the commands, so that `shorttail --help` answers at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from shorttail.cli.apply import apply, plan
from shorttail.cli.bench import bench
from shorttail.cli.erase import delete_entity
from shorttail.cli.history import history
from shorttail.cli.init import init
from shorttail.cli.lineage import lineage
from shorttail.cli.migrate import migrate
from shorttail.cli.models import models
from shorttail.cli.operate import backup, stat, verify
from shorttail.cli.options import (
    answerer,
    as_of_option,
    by_option,
    changed_by,
    code_option,
    json_option,
    load_options,
    progress_bar,
    source_options,
)
from shorttail.cli.output import count_document, count_line, print_json, print_table, status_notes
from shorttail.cli.rows import delete, load, push
from shorttail.cli.serve_options import settings_options
from shorttail.cli.store_settings import settings
from shorttail.cli.tune import tune
from shorttail.cli.views import search, views
from shorttail.cli.where import store_or_server
from shorttail.config import DEFAULT_HOST, DEFAULT_PORT, VERSION
from shorttail.define.inputs import without_copies
from shorttail.errors import InvalidArgument, NotFound, ShorttailError, printable
from shorttail.server.signals import keep_running

if TYPE_CHECKING:
    from shorttail.server.settings import ServerSettings


def main() -> None:
    """Run the command line.

    Exit code 0: done; 1: failed, with a line `error: ...` on stderr; 2: wrong usage; 130: Ctrl-C.
    """
    keep_running()
    os.umask(os.umask(0o022) | 0o022)  # nothing that a command or a server makes can be written by others
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks must not fail
    try:
        code = cli.main(prog_name="shorttail", standalone_mode=False)
    except ShorttailError as error:
        fail(error.message, 1)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "shorttail"
        hint = "an argument that begins with - comes after --; " if isinstance(error, click.NoSuchOption) else ""
        fail(f"{error.format_message()} ({hint}see `{command} --help`)", 2)
    except click.ClickException as error:
        fail(error.format_message(), 1)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted", 130)
    except BrokenPipeError:  # the reader of the output has closed it
        drop_output()
        sys.exit(1)
    except OSError as error:
        drop_output()
        fail(f"{error.filename or 'cannot write the output'}: {error.strerror or error}", 1)
    sys.exit(code if isinstance(code, int) else 0)


def drop_output() -> None:
    """Let what stdout still holds go nowhere. Without this the interpreter would fail again when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str, code: int) -> None:
    lines = (line.strip() for line in without_copies(message).splitlines())
    with contextlib.suppress(OSError):  # the disk of stderr may be full too
        click.echo(f"error: {printable(' '.join(line for line in lines if line))}", err=True)
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(VERSION, prog_name="shorttail")
def cli() -> None:
    """Serve features and predictions of structured-data models with a short latency tail.

    \b
    shorttail init churn                              make a folder to start from
    shorttail apply definitions.py --store store --create   register views and models
    shorttail materialize --store store               load the views from their sources
    shorttail serve --store store                     answer on 127.0.0.1:7711
    """


@cli.command()
@click.argument("views", nargs=-1, metavar="[VIEW]...")
@store_or_server
@load_options
@by_option
@json_option
def materialize(views: tuple[str, ...], store: str, memory_mib: int, allow_shrink: bool, as_json: bool) -> None:
    """Load views from their sources.

    VIEW is the name of a view; without it, every view that has a source is loaded. The new rows replace
    all old rows of the view in a single commit, so no reader sees a mixture. Of rows with the same key, the
    one with the latest event time is loaded; the others are counted as older, or as duplicate if they have
    the same event time.

    \b
    Example:
      shorttail materialize --store store
      shorttail materialize --store store user_stats --memory-mib 512
    """
    from shorttail.engine import Engine
    from shorttail.sources import batches  # noqa: F401  imported before the time is measured

    loaded = []
    with Engine.open(store, by=changed_by()) as engine:
        engine.refresh()
        catalog = engine.store.catalog
        chosen = list(views) or [name for name, view in catalog.views.items() if view.source]
        if not chosen:
            raise InvalidArgument(
                f"{store} has no view with a source; give a view source=st.ParquetSource(...) and apply it"
            )
        for name in chosen:
            catalog.view(name)
        for name in chosen:
            with progress_bar(name) as progress:
                start_s = time.perf_counter()
                count = engine.materialize(name, progress, memory_bytes=memory_mib << 20, allow_shrink=allow_shrink)
                seconds = time.perf_counter() - start_s
            loaded.append(count_document(name, count, seconds))
            if not as_json:
                click.echo(count_line(name, count, seconds))
    if as_json:
        print_json(loaded)


@cli.command()
@click.option(
    "--store",
    required=True,
    metavar="STORE",
    envvar="SHORTTAIL_STORE",
    show_envvar=True,
    help="Folder of the online store.",
)
@click.option(
    "--host",
    default=DEFAULT_HOST,
    show_default=True,
    envvar="SHORTTAIL_HOST",
    show_envvar=True,
    help="Address to listen on.",
)
@click.option(
    "--port",
    default=DEFAULT_PORT,
    show_default=True,
    envvar="SHORTTAIL_PORT",
    show_envvar=True,
    help="TCP port to listen on; 0 takes a free port.",
)
@click.option("--uds", metavar="PATH", help="Path of a Unix socket to listen on.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Number of serving processes.")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Device for models that are not forests: cpu, cuda or cuda:N.",
)
@click.option("--pretouch", is_flag=True, help="Map the store's file into memory before the first request.")
@click.option("--lock-memory", is_flag=True, help="As --pretouch, and lock the file in memory (see ulimit -l).")
@code_option
@settings_options
@click.option("--check", is_flag=True, help="Open the store, load the models, and exit.")
def serve(
    store: str,
    host: str,
    port: int,
    uds: str | None,
    workers: int,
    device: str,
    pretouch: bool,
    lock_memory: bool,
    no_code: bool,
    check: bool,
    settings: ServerSettings,
) -> int:
    """Serve features and predictions.

    Answers MessagePack-RPC over TCP or a Unix socket, and HTTP on a port of its own, until SIGTERM or
    Ctrl-C. SIGHUP replaces the workers by new ones, which read tokens and certificates again.

    \b
    Example:
      shorttail serve --store store --workers 4
      shorttail serve --store store --device cuda
    """
    from shorttail.server import supervisor

    return supervisor.serve(
        store,
        host=host,
        port=port,
        uds=uds,
        workers=workers,
        device=device,
        pretouch=pretouch,
        lock_memory=lock_memory,
        code=not no_code,
        check=check,
        settings=settings,
    )


@cli.command()
@click.argument("model")
@click.argument("values", nargs=-1, metavar="COLUMN=VALUE...")
@source_options
@click.option("--version", type=int, help="Version of the model; without it, the current version.")
@as_of_option
@code_option
@json_option
def predict(
    model: str,
    values: tuple[str, ...],
    store: str | None,
    server: str | None,
    version: int | None,
    as_of: str | int | None,
    no_code: bool,
    as_json: bool,
) -> None:
    """Run MODEL on keys and request columns.

    COLUMN=a,b,c makes a batch of three rows. A column with a single value has it in all rows. A COLUMN that
    begins with - comes after --.

    \b
    Example:
      shorttail predict fraud user_id=1,2,3 amount=9.5 --store store
      shorttail predict fraud user_id=1 amount=9.5 --server 127.0.0.1:7711
    """
    from shorttail.define.names import quoted, suggestion
    from shorttail.define.text import parse_columns
    from shorttail.models.raw import refusal

    with answerer(store, server, not no_code) as source:
        by_name = {item["name"]: item for item in source.models()}
        if model not in by_name:
            raise NotFound(f"no model {quoted(model)}{suggestion(model, by_name, 'models')}")
        if "tensors" in by_name[model]:
            raise InvalidArgument(refusal(model))
        columns = parse_columns(values, by_name[model]["columns"], f"model '{model}'")
        options: dict[str, Any] = {"statuses": True} if store is None else {}
        result = source.predict(model, columns, version=version, as_of=as_of, **options)
    if as_json:
        return print_json(result.to_dict())
    click.echo(f"{model} version {result.version}")
    # An output of shape [rows, 1] is shown as a number in each row, not as a list.
    arrays = {name: a.ravel() if a.shape[1:] == (1,) else a for name, a in result.outputs.items()}
    outputs = {name: array.tolist() for name, array in arrays.items()}
    print_table(*batch_table(columns, outputs, status_notes(result.statuses)))


@cli.command()
@click.argument("arguments", nargs=-1, required=True, metavar="VIEW:FEATURE... KEY=VALUE...")
@source_options
@as_of_option
@json_option
def features(
    arguments: tuple[str, ...], store: str | None, server: str | None, as_of: str | int | None, as_json: bool
) -> None:
    """Look up features by key.

    KEY=a,b,c looks up three rows. A key with a single value has it in all rows. ALIAS:VIEW:FEATURE looks up
    by the columns of an alias.

    \b
    Example:
      shorttail features user_stats:age user_stats:tier user_id=1,2,3 --store store
      shorttail features buyer:user_stats:age buyer_id=1 --store store
      shorttail features user_stats:age user_id=1 --as-of 2026-11-20T10:00 --store store
    """
    from shorttail.define.names import listed_lookups, lookup_of
    from shorttail.define.text import parse_columns

    references = [argument for argument in arguments if is_reference(argument)]
    values = [argument for argument in arguments if not is_reference(argument)]
    lookups = dict.fromkeys(map(lookup_of, references))
    with answerer(store, server) as source:
        known = listed_lookups(source.views())
        columns: dict[str, Any] = {}
        if lookups and lookups.keys() <= known.keys():  # else the error is about the references
            keys = {column: dtype for lookup in lookups for column, dtype in known[lookup].items()}
            columns = parse_columns(values, keys, ", ".join(sorted(lookups)))
        result = source.get_online_features(references, columns, as_of=as_of)
    found = result.to_dict()
    if as_json:
        from shorttail.results import Status

        statuses = {ref: [Status(code).name for code in codes] for ref, codes in result.feature_statuses.items()}
        return print_json({"features": found, "statuses": statuses})
    print_table(*batch_table(columns, found, status_notes(result.statuses, result.feature_statuses)))


def is_reference(argument: str) -> bool:
    """Return whether an argument of `features` is VIEW:FEATURE, not KEY=VALUE. FEATURE may hold a =, KEY holds no :."""
    name, equals, _ = argument.partition("=")
    return ":" in name or not equals


def batch_table(
    columns: dict[str, Any], results: dict[str, list[Any]], notes: list[str]
) -> tuple[list[str], list[list[Any]]]:
    """Return the header and the rows of a table: request columns, results, and notes on missing values if any."""
    count = max((len(values) for values in results.values()), default=0)
    lists = {name: value if isinstance(value, list) else [value] for name, value in columns.items()}
    request = {name: values * count if len(values) == 1 else values for name, values in lists.items()}
    # Pairs, because a request column, an output and "status" may have the same name.
    shown = [*request.items(), *results.items(), *([("status", notes)] if any(notes) else [])]
    return [name for name, _ in shown], [list(row) for row in zip(*(values for _, values in shown), strict=False)]


cli.add_command(apply)
cli.add_command(backup)
cli.add_command(bench)
cli.add_command(delete)
cli.add_command(delete_entity)
cli.add_command(history)
cli.add_command(init)
cli.add_command(lineage)
cli.add_command(load)
cli.add_command(migrate)
cli.add_command(models)
cli.add_command(plan)
cli.add_command(push)
cli.add_command(search)
cli.add_command(settings)
cli.add_command(tune)
cli.add_command(stat)
cli.add_command(verify)
cli.add_command(views)
