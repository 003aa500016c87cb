"""`editx data split`, `candidates`, `judge` and `hardest`: from prompts to what preferences and PPO are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from editx.cli import options
from editx.cli.remote import check_device

Prompts = Annotated[Path, typer.Argument(help="Folder of a set whose rows are the prompts, built with keep_audio.")]
Sets = Annotated[Path, typer.Option(help="Folder of data sets.")]


def split(
    dataset: Annotated[Path, typer.Argument(help="Folder of a version of a data set, or a JSONL file of rows.")],
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the rows that is held out.")] = 0.1,
    by: Annotated[str, typer.Option(help="speaker, or text where speakers may be shared.")] = "speaker",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Sets = Path("out/datasets"),
) -> None:
    """Cut a set into NAME-train and NAME-held-out, which share no speaker, text or recording; prints both folders."""
    from services.trainer.data import splits
    from services.trainer.data.manifest import Dataset
    from shared.errors import UserError

    if by not in ("speaker", "text"):
        raise UserError(f"A set cannot be split by {by!r}.", "By speaker or text.", "invalid_dataset")
    made = splits.split(Dataset.load(dataset), share, "speaker" if by == "speaker" else "text", seed)
    parts = (made.training, made.held_out)
    document = {part.name: {"folder": str(part.save(out)), "rows": len(part.rows), "left_out": len(part.refused)}
                for part in parts}  # fmt: skip
    typer.echo(json.dumps(document))


def candidates(
    prompts: Prompts,
    out: Annotated[Path, typer.Option(help="Folder of the candidates; a run that stopped goes on from it.")],
    checkpoint: options.CheckpointOption = "nano",
    count: Annotated[int, typer.Option(min=2, help="Answers to each prompt.")] = 20,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.9,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Recordings decoded at a time.")] = 2,
    device: options.DeviceOption = "cpu",
    steps: options.StepsOption = 10,
) -> None:
    """Draw a checkpoint's answers to every prompt and decode them, to be rated by people or judges."""
    from editx.training import Served
    from services.trainer.core.hashes import weights_hash
    from services.trainer.data.candidates import CANDIDATES, Draws, make_candidates
    from services.trainer.data.manifest import Dataset
    from services.trainer.evaluate.system import PortSystem
    from shared.checkpoints.layout import Checkpoint
    from shared.checkpoints.step1 import load_text_tokenizer

    check_device(device)
    found, asked, served = Checkpoint.resolve(checkpoint), Dataset.load(prompts), Served()
    try:
        with _bar("prompts") as show:
            system = PortSystem(served(found.root, device), load_text_tokenizer(found), steps)
            made = make_candidates(asked, system, weights_hash(found.step1_files), out,
                                   Draws(count, temperature, seed), workers=workers, progress=show)  # fmt: skip
    finally:
        served.close()
    typer.echo(f"{out / CANDIDATES}: {made} candidates for {len(asked.rows)} prompts")


def judge(
    candidates: Annotated[Path, typer.Argument(help="candidates.jsonl of `editx data candidates`.")],
    out: Annotated[Path, typer.Option(help="JSONL that ratings are appended to; those that are there are not asked.")],
    judge: options.JudgeOption = "judge.json",
    judge_url: options.JudgeUrlOption = "",
    judge_key: options.JudgeKeyOption = "",
    judge_rate: options.JudgeRateOption = 60.0,
    judge_cost: options.JudgeCostOption = 0.0,
    judge_budget: options.JudgeBudgetOption = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Candidates at a time.")] = 2,
) -> None:
    """Have a judge rate candidates from 1 to 10."""
    from services.trainer.data.candidates import judge_candidates
    from services.trainer.evaluate.asking import Cost, open_judge

    cost = Cost(judge_rate, judge_cost, judge_budget)
    asked = open_judge(judge, candidates.parent / "judge-cache", url=judge_url, key=judge_key, cost=cost)
    with _bar("candidates") as show:
        rated, unheard = judge_candidates(candidates, asked, out, workers=workers, progress=show)
    typer.echo(f"{out}: {rated} ratings by {asked.name}, {unheard} of edits that it cannot hear")


def hardest(
    prompts: Prompts,
    candidates: Annotated[Path, typer.Option(help="candidates.jsonl of the prompts.")],
    ratings: Annotated[list[Path], typer.Option(help="Ratings of the candidates, of people or of judges.")],
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the prompts that is kept.")] = 0.5,
    out: Sets = Path("out/datasets"),
) -> None:
    """Keep the prompts whose candidates were rated lowest, as NAME-hardest; prints its folder."""
    from dataclasses import replace

    from services.trainer.data.candidates import prompt_scores, read_heard
    from services.trainer.data.manifest import Dataset
    from services.trainer.data.preferences import Weights, read_ratings, scores_of
    from services.trainer.ppo.trainer import hardest

    asked = Dataset.load(prompts)
    scores = scores_of([rating for path in ratings for rating in read_ratings(path)], Weights())
    rows = hardest(asked.rows, prompt_scores(asked, read_heard(candidates), scores), share)
    made = replace(asked, name=f"{asked.name}-hardest", rows=tuple(rows), refused=(),
                   made_by={"hardest_of": asked.version, "share": share})  # fmt: skip
    typer.echo(str(made.save(out)))


@contextmanager
def _bar(what: str) -> Iterator[Callable[[float, str], None]]:
    """A progress bar on standard error."""
    from services.trainer.core.runs import Bar

    bar = Bar(what)
    yield bar.progress
    Console(stderr=True).print()


COMMANDS = (split, candidates, judge, hardest)
