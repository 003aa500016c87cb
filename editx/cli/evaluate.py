"""`editx eval`: run the edit benchmark against a checkpoint, report, and fit the offline judge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editx.cli import options
from editx.cli.remote import check_device

app = typer.Typer(help="Benchmark edits: accuracy by iteration, words, voice and naturalness.", no_args_is_help=True)


@app.command()
def run(
    benchmark: Annotated[Path, typer.Argument(help="JSONL in the format of Step-Audio-Edit-Benchmark.")],
    out: Annotated[Path, typer.Option(help="Result folder; a run that stopped goes on from it.")],
    checkpoint: options.CheckpointOption = "nano",
    judge: options.JudgeOption = "judge.json",
    judge_url: options.JudgeUrlOption = "",
    judge_key: options.JudgeKeyOption = "",
    judge_rate: options.JudgeRateOption = 60.0,
    judge_cost: options.JudgeCostOption = 0.0,
    judge_budget: options.JudgeBudgetOption = None,
    iterations: Annotated[int, typer.Option(min=0, max=10)] = 3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Cases at a time.")] = 2,
    fixed_prompt: Annotated[bool, typer.Option(help="Edit iteration 0 each time.")] = False,
    measures: Annotated[bool, typer.Option(help="Word errors, voice and naturalness by offline judges.")] = False,
    gateway: Annotated[
        str | None, typer.Option(help="Edit by jobs of the hosted system there, as http://host:8000, not here.")
    ] = None,
    gateway_key: Annotated[str | None, typer.Option(envvar="EDITX_API_KEY", help="The key for --gateway.")] = None,
    n_best: Annotated[
        int, typer.Option(min=1, max=32, help="Answers to an edit, of which the reward model picks.")
    ] = 1,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0, help="The checkpoint's unless given.")] = None,
    device: options.DeviceOption = "cpu",
    steps: options.StepsOption = 10,
) -> None:
    """Clone, edit again and again, judge every iteration; then write report.md."""
    from tqdm import tqdm

    from editx.constellation import GatewaySystem
    from editx.remote import RemoteEditor
    from editx.training import Served
    from services.trainer.evaluate import runner
    from services.trainer.evaluate.asking import Cost, open_judge
    from services.trainer.evaluate.benchmark import read_cases
    from services.trainer.evaluate.judges import Judges
    from services.trainer.evaluate.report import write_report
    from services.trainer.evaluate.system import PortSystem
    from services.trainer.recipes.nano import assets
    from shared.checkpoints.layout import Checkpoint
    from shared.checkpoints.reward import reward_folder
    from shared.checkpoints.step1 import load_text_tokenizer

    check_device(device)
    cases = read_cases(benchmark)
    cost = Cost(judge_rate, judge_cost, judge_budget)
    asked = open_judge(judge, out / "judge-cache", url=judge_url, key=judge_key, cost=cost)
    served, bar = Served(), tqdm(total=len(cases), desc="cases")
    remote = RemoteEditor(gateway, gateway_key) if gateway else None

    def show(fraction: float, note: str) -> None:
        bar.n = round(fraction * len(cases))
        bar.set_postfix_str(note)

    try:
        system: runner.System
        if remote is not None:
            name, system = "hosted", GatewaySystem(remote, steps, temperature, n_best)
        else:
            found = Checkpoint.resolve(checkpoint)
            name = found.metadata.name
            if n_best > 1:
                reward_folder(found)
            tokenizer = load_text_tokenizer(found)
            system = PortSystem(served(found.root, device), tokenizer, steps, temperature, n_best)
        lines = runner.run(
            cases, system, asked, out, runner.Setup(iterations, seed, workers, fixed_prompt), progress=show,
            measures=runner.OfflineMeasures(Judges(assets.prepare().whisper)) if measures else None,
        )  # fmt: skip
    finally:
        served.close()
        if remote is not None:
            remote.close()
        bar.close()
    typer.echo(write_report({name: lines}, out).read_text(encoding="utf-8"))


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Result folders; the first is what others are compared with.")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
) -> None:
    """Tables and pictures of one system or several, with bootstrap intervals and paired gains."""
    from services.trainer.evaluate.report import write_report
    from services.trainer.evaluate.runner import read_results
    from shared.errors import UserError

    found = {path.name: read_results(path) for path in results}
    for path in results:
        if not found[path.name]:
            raise UserError(f"There are no results in {path}.", "Give a folder of `editx eval run`.")
    typer.echo(write_report(found, out).read_text(encoding="utf-8"))


@app.command("make-benchmark")
def make_benchmark(
    recordings: Annotated[Path, typer.Argument(help="JSONL of held-out voices: id, audio, text, language, speaker.")],
    texts: Annotated[Path, typer.Argument(help="JSONL of held-out texts: text, language, manner, or [sounds] in it.")],
    out: Annotated[Path, typer.Option(help="Folder of the benchmark: cases.jsonl and its recordings.")],
    count: Annotated[int, typer.Option(min=1, help="Cases; the texts are taken in turn.")] = 160,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a benchmark of your own in the format of Step-Audio-Edit-Benchmark."""
    from services.trainer.evaluate.benchmark import make_benchmark

    cases = make_benchmark(recordings, texts, out, count, seed)
    typer.echo(f"{out / 'cases.jsonl'}: {cases} cases")


@app.command("fit-judge")
def fit_judge(
    examples: Annotated[Path, typer.Argument(help="JSONL: task, label, source (neutral), audio, text, source_text.")],
    out: Annotated[Path, typer.Option(help="The judge file to write.")] = Path("judge.json"),
) -> None:
    """Fit the offline acoustic judge on labelled recordings; the label "neutral" belongs into every task."""
    from services.trainer.evaluate.examples import fit_acoustic_judge

    judge, counts = fit_acoustic_judge(examples)
    judge.save(out)
    typer.echo(f"{out}: {', '.join(f'{task} from {count}' for task, count in counts.items())}")
