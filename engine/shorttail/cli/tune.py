"""`shorttail tune`: measures which settings run a model fastest on this host, and stores them."""

from __future__ import annotations

import click

from shorttail.cli.options import by_option, json_option, opened
from shorttail.cli.output import print_json, print_table
from shorttail.cli.where import store_or_server


@click.command()
@click.argument("model")
@store_or_server
@by_option
@click.option("--version", type=int, help="Version of the model; without it, the current version.")
@click.option("--device", default="cpu", show_default=True, help="Device to measure: cpu, cuda or cuda:N.")
@click.option(
    "--seconds", default=1.0, show_default=True, type=click.FloatRange(0, 600), help="Duration for each batch size."
)
@click.option("--dry-run", is_flag=True, help="Measure, and write nothing.")
@json_option
def tune(
    model: str, store: str, version: int | None, device: str, seconds: float, dry_run: bool, as_json: bool
) -> None:
    """Find the fastest settings for MODEL on this host.

    Measures the compiled forest and ONNX Runtime with several settings on random rows, and writes the
    fastest settings into the store. They are used on hosts with the same CPU; tune other hosts separately.

    \b
    Example:
      shorttail tune fraud --store store
    """
    from shorttail.models.device import Device, check_cuda
    from shorttail.registry import tune as tuning

    where = Device.parse(device)
    if where.kind == "cuda":
        check_cuda(where)
    with opened(store) as target:
        result = tuning.tune(target, model, version, where, seconds)
        if not dry_run:
            tuning.save(target, result)
    if as_json:
        return print_json(
            {
                "model": result.model,
                "version": result.version,
                "host": result.host,
                "candidates": [
                    {"settings": c.settings.to_json(), "runs": c.runner.model.description, "us": c.median_us}
                    for c in result.candidates
                ],
                "chosen": result.best.settings.to_json(),
                "written": not dry_run,
            }
        )
    click.echo(f"{model} version {result.version} on {result.host}: median microseconds per batch")
    rows = [[c.runner.model.description, *(round(us, 1) for us in c.median_us.values())] for c in result.candidates]
    print_table(["runs as", *(f"{n} row{'s' * (n != 1)}" for n in result.candidates[0].median_us)], rows)
    if result.candidates[0].runner.kind != "forest":
        click.echo(f"no compiled forest: {result.candidates[0].runner.why}")
    note = "dry run, nothing written" if dry_run else f"written to {store}"
    click.echo(f"chosen: {result.best.runner.model.description}; {note}")
