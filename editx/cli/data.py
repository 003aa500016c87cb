"""`editx data`: build, look at, check and rate data sets for post-training."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from editx.cli import candidates, options
from editx.cli.remote import check_device

if TYPE_CHECKING:
    from services.trainer.data.build import Tokenize

app = typer.Typer(help="Build, describe, check and rate data sets for post-training.", no_args_is_help=True)

for _command in candidates.COMMANDS:
    app.command()(_command)

Set = Annotated[Path, typer.Argument(help="Folder of a version of a data set, or a JSONL file of rows.")]


@app.command()
def build(
    description: Annotated[Path, typer.Argument(help="YAML or JSON: kind, name and what it is built from.")],
    out: Annotated[Path, typer.Option(help="Folder of data sets.")] = Path("out/datasets"),
    checkpoint: options.CheckpointOption = "nano",
    device: options.DeviceOption = "cpu",
    teacher_key: Annotated[
        str, typer.Option(envvar="EDITX_TEACHER_KEY", help="Key of the cloning API, where the description names one.")
    ] = "",
    as_json: options.JsonOption = False,
) -> None:
    """Build a data set: a version named by its content; the same material gives the same version.

    A build that was killed goes on with the rows that it had made.
    """
    from services.trainer.core.configs import read_config
    from services.trainer.core.hashes import tokenizer_hash
    from services.trainer.data.specs import build_spec
    from shared.checkpoints.layout import Checkpoint

    with _tokenizer(checkpoint, device) as tokenize:
        built = build_spec(
            read_config(description), description.parent, tokenize, key=teacher_key, root=out,
            coded_by=lambda: tokenizer_hash(Checkpoint.resolve(checkpoint)),
        )  # fmt: skip
    folder, dataset = built.save(out), built.dataset
    document = {"folder": str(folder), "version": dataset.version, "rows": len(dataset.rows),
                "refused": [refused.__dict__ for refused in dataset.refused]}  # fmt: skip
    if as_json:
        typer.echo(json.dumps(document))
        return
    console = Console(stderr=True)
    for refused in dataset.refused:
        console.print(f"row {refused.row} ({refused.id}) left out: {refused.reason}", markup=False, highlight=False)
    console.print(f"{folder}: {len(dataset.rows)} rows, {len(dataset.refused)} left out.", highlight=False)


@app.command()
def stats(
    dataset: Set,
    picture: Annotated[Path | None, typer.Option(help="Draw them into this PNG.")] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Hours, speakers, languages, categories, licences and margins."""
    from services.trainer.core.plots import draw_overview
    from services.trainer.data.checks import hours_by, margins_of, statistics
    from services.trainer.data.manifest import Dataset

    found = Dataset.load(dataset)
    document = statistics(found)
    if picture is not None:
        bars = {
            "hours by language": hours_by(found.rows, lambda row: row.language),
            "hours by speaker": hours_by(found.rows, lambda row: row.speaker),
            "hours by category": hours_by(found.rows, lambda row: row.category),
        }
        draw_overview(bars, {"margins": margins_of(found.rows)}, picture, f"{found.name} {found.version}")
    if as_json:
        typer.echo(json.dumps(document))
        return
    table = Table("", "", title=f"{found.name} {found.version}", show_header=False)
    for name, value in document.items():
        table.add_row(name, _shown(value))
    Console().print(table)


@app.command()
def check(
    dataset: Set,
    against: Annotated[
        list[Path], typer.Option(help="Data sets and benchmarks (JSONL of cases) that must share nothing with it.")
    ],
    share_speakers: Annotated[bool, typer.Option(help="Speakers may be shared.")] = False,
    checkpoint: options.CheckpointOption = "nano",
    device: options.DeviceOption = "cpu",
) -> None:
    """Fail if speakers, texts or audio of an evaluation set are in the data set.

    The checkpoint's tokenizer codes a benchmark's recordings where the set was made from tokens alone.
    """
    from services.trainer.data.checks import check_leaks, read_held_out
    from services.trainer.data.manifest import Dataset

    found = Dataset.load(dataset)
    with _tokenizer(checkpoint, device) as tokenize:
        held_out = [read_held_out(path, found.rows, tokenize) for path in against]
    check_leaks(found.rows, held_out, speakers=not share_speakers)
    typer.echo(f"{found.name} {found.version}: no leaks into {', '.join(str(path) for path in against)}.")


@app.command()
def publish(
    dataset: Set,
    store: Annotated[str, typer.Option(envvar="EDITX_STORE_URL", help="s3://..., s3+http://... or file:///folder.")],
) -> None:
    """Put a set with its recordings and their hashes into a store, where training jobs find it; prints its prefix."""
    from services.trainer.data.manifest import Dataset
    from shared.wiring import open_store

    typer.echo(Dataset.load(dataset).publish(open_store(store)))


@app.command()
def fetch(
    prefix: Annotated[str, typer.Argument(help="What `publish` printed: datasets/NAME/VERSION.")],
    store: Annotated[str, typer.Option(envvar="EDITX_STORE_URL", help="s3://..., s3+http://... or file:///folder.")],
    out: Annotated[Path, typer.Option(help="Folder of data sets.")] = Path("out/datasets"),
) -> None:
    """Bring a published set here, its hashes checked; prints its folder."""
    from services.trainer.data.manifest import fetch
    from shared.wiring import open_store

    with tempfile.TemporaryDirectory() as passing:
        typer.echo(fetch(open_store(store), prefix, Path(passing)).save(out))


@app.command("import-sounds")
def import_sounds(
    corpus: Annotated[
        Path, typer.Argument(help="Folder in NVSpeech's layout: metadata.jsonl, or a JSON per recording.")
    ],
    licence: Annotated[str, typer.Option(help="Of the corpus, e.g. CC-BY-NC-SA-4.0.")],
    out: Annotated[Path, typer.Option(help="JSONL to write; a description names it as recordings.")] = Path(
        "recordings.jsonl"
    ),
    language: Annotated[str, typer.Option(help="Where the corpus names none.")] = "zh",
    origin: Annotated[str, typer.Option(help="What rows are said to come from.")] = "NVSpeech",
) -> None:
    """List a corpus whose texts mark sounds, [Laughter] or (Laughter), for a set of kind paralinguistic."""
    from services.trainer.data.nvspeech import import_recordings

    count, refused = import_recordings(corpus, out, licence=licence, language=language, origin=origin)
    console = Console(stderr=True)
    for one in refused:
        console.print(f"{one.id} left out: {one.reason}", markup=False, highlight=False)
    console.print(f"{out}: {count} recordings, {len(refused)} left out.", markup=False, highlight=False)


@app.command("fit-margins")
def fit_margins(
    rated: Annotated[
        Path,
        typer.Argument(help="JSONL or CSV: id, category (emotion sad), rating (1 to 10), source (neutral), audio."),
    ],
    out: Annotated[Path, typer.Option(help="The scorer to write; a description names it as margin_scorer.")] = Path(
        "margin.json"
    ),
) -> None:
    """Fit the margin scorer on pairs of recordings that people rated for how clearly they differ."""
    from services.trainer.data.rated_pairs import fit_margin_scorer

    fitted = fit_margin_scorer(rated)
    fitted.scorer.save(out)
    told = "too few to hold some back" if fitted.error is None else (
        f"off by {fitted.error:.2f} of 10 on the fifth held back (their mean: {fitted.error_of_the_mean:.2f})"
    )  # fmt: skip
    typer.echo(f"{out}: from {fitted.pairs} pairs, {told}")


@app.command()
def rate(
    items: Annotated[Path, typer.Argument(help="JSONL: candidate, instruction, text, source, audio (paths).")],
    rater: Annotated[str, typer.Option(help="Your name; the order of the candidates follows from it.")],
    out: Annotated[Path, typer.Option(help="JSONL file that ratings are appended to.")] = Path("ratings.jsonl"),
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 0,
) -> None:
    """Open a local page to listen to candidates and rate them from 1 to 5, blind and shuffled."""
    from services.trainer.data.rating import RatingServer, read_items

    made = read_items(items)
    server = RatingServer(made, rater, out, port)
    typer.echo(f"Listen and rate at {server.url} (Ctrl-C ends; ratings are in {out})")
    try:
        server.serve()
    finally:
        server.close()


@contextmanager
def _tokenizer(checkpoint: str, device: str) -> Iterator[Callable[[], Tokenize]]:
    """The checkpoint's tokenizer, loaded when it is asked for."""
    from editx.training import Served
    from services.trainer.data.build import tokenize_with
    from shared.checkpoints.layout import Checkpoint

    check_device(device)
    served = Served()
    try:
        yield lambda: tokenize_with(served(Checkpoint.resolve(checkpoint).root, device))
    finally:
        served.close()


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_shown(part)}" for name, part in value.items())
    return str(value)
