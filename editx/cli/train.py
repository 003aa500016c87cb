"""`editx train`: the stages of post-training one by one or in a row, and training jobs for the hosted system."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from editx.cli import options
from editx.cli.remote import check_device

if TYPE_CHECKING:
    from services.trainer.jobs import TrainingSettings

app = typer.Typer(help="Post-train: supervised fine-tuning, reward model, PPO, or all stages.", no_args_is_help=True)

Base = Annotated[str, typer.Option(help="Checkpoint to start from: a name or a directory.")]
Data = Annotated[str, typer.Option(help="Folder of a data set, or its prefix in the artifact store.")]
HeldOut = Annotated[str | None, typer.Option(help="A data set for the measures.")]
Config = Annotated[Path | None, typer.Option(help="YAML or JSON with entries of the stage's config.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="One entry, e.g. loop.lr=1e-5. May be repeated.")]
Out = Annotated[Path, typer.Option(help="Run folder; a run that stopped goes on from it.")]
Publish = Annotated[str | None, typer.Option(help="Name under which the new checkpoint is published.")]
Rollouts = Annotated[str, typer.Option(help=(
    "Who draws answers: engine (the language model service's, in this process; not in a job), pool (servers at "
    "EDITX_TRAINER_POOL that load from EDITX_TRAINER_POOL_FOLDER) or local (the trainer's own sampler)."
))]  # fmt: skip
Scores = Annotated[str, typer.Option(help="Who scores them: local, or pool (EDITX_TRAINER_REWARD_URL).")]
Hardest = Annotated[float, typer.Option(help=(
    "Share of the prompts that is trained on: those whose answers by the base get the lowest rewards."
))]  # fmt: skip
HeldOutJudge = Annotated[str | None, typer.Option("--judge", help=(
    "Watch the answers to held-out prompts: a judge file of `eval fit-judge`, gemini:MODEL or openai:MODEL "
    "(EDITX_JUDGE_URL, _KEY, _RATE, _COST, _BUDGET)."
))]  # fmt: skip
Gate = Annotated[list[str] | None, typer.Option(help="Lowest value of a measure to publish, e.g. accuracy=0.8.")]


@app.command()
def sft(
    data: Data, out: Out, base: Base = "nano", held_out: HeldOut = None, config: Config = None, entries: Set = None,
    publish: Publish = None, gate: Gate = None, device: options.DeviceOption = "cpu",
) -> None:  # fmt: skip
    """Supervised fine-tuning on the answers' audio tokens; one epoch, 1e-5 to 1e-6 by default."""
    _run("sft", _settings(base, data, held_out, None, config, entries, publish, gate), out, device)


@app.command()
def reward(
    data: Data, out: Out, base: Base = "nano", held_out: HeldOut = None, config: Config = None, entries: Set = None,
    publish: Publish = None, gate: Gate = None, device: options.DeviceOption = "cpu",
) -> None:  # fmt: skip
    """The reward model, from an SFT checkpoint and preferences; the result is that checkpoint with a folder reward."""
    _run("reward", _settings(base, data, held_out, None, config, entries, publish, gate), out, device)


@app.command()
def ppo(
    data: Data, out: Out, reward: Annotated[str, typer.Option(help="Checkpoint of the reward model.")],
    base: Base = "nano", held_out: HeldOut = None, rollouts: Rollouts = "engine", scores: Scores = "local",
    hardest_share: Hardest = 1.0, judge: HeldOutJudge = None,
    config: Config = None, entries: Set = None, publish: Publish = None, gate: Gate = None,
    device: options.DeviceOption = "cpu",
) -> None:  # fmt: skip
    """PPO against a reward model, from an SFT checkpoint and prompts (rows of any data set)."""
    settings = _settings(base, data, held_out, reward, config, entries, publish, gate, rollouts, scores, hardest_share,
                         judge)  # fmt: skip
    _run("ppo", settings, out, device)


@app.command()
def post(
    work: Annotated[Path, typer.Option(help="Folder of the post-training; finished stages are skipped.")],
    base: Base = "nano",
    form: Annotated[str, typer.Option(help="tiny, cpu, gpu or official: the sizes.")] = "cpu",
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage. May be repeated.")] = None,
    config: Config = None,
    entries: Set = None,
    measures: Annotated[bool, typer.Option(help="Word errors, voice and naturalness by the offline judges.")] = True,
) -> None:
    """All stages: record, judges, data, both SFT sets, iterate, preferences, reward, ppo, evaluate, measure.

    In one process; the single stages run in several.
    """
    import os

    from editx.training import Served
    from services.trainer.core.configs import parse_assignments, read_config, with_entries
    from services.trainer.core.runs import Bar
    from services.trainer.evaluate.judges import Judges
    from services.trainer.evaluate.runner import OfflineMeasures
    from services.trainer.recipes.nano import assets
    from services.trainer.recipes.post_train.config import FORMS
    from services.trainer.recipes.post_train.outcome import OUTCOME
    from services.trainer.recipes.post_train.readers import CheapTeacher, Teacher
    from services.trainer.recipes.post_train.stages import STAGES, PostTrain
    from shared.checkpoints.layout import Checkpoint
    from shared.errors import UserError

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise UserError(f"`editx train post` runs in one process, and torchrun started {processes}.",
                        "Start one, or run the single stages under torchrun: editx train sft, reward or ppo.",
                        "invalid_training")  # fmt: skip
    if form not in FORMS:
        raise UserError(f"There is no form {form!r}.", f"Known: {', '.join(FORMS)}.", "invalid_training")
    chosen = with_entries(FORMS[form](), read_config(config) if config else {})
    chosen = with_entries(chosen, parse_assignments(entries or []))
    check_device(chosen.device)
    wanted = stage or list(STAGES)
    served = Served()
    try:
        training = PostTrain(
            chosen, Checkpoint.resolve(base), work, served,
            readers=lambda: [Teacher(), CheapTeacher()],
            measures=OfflineMeasures(Judges(assets.prepare().whisper)) if measures and "measure" in wanted else None,
            observer=Bar("post-training"),
        )  # fmt: skip
        with _measured():
            training.run(stage or ())
    finally:
        served.close()
    for name in STAGES:
        if training.work.is_done(name):
            Console(stderr=True).print(f"{name}: done", highlight=False)
    outcome = work / OUTCOME
    if outcome.exists():
        typer.echo(outcome.read_text(encoding="utf-8"))


@app.command()
def submit(
    recipe: Annotated[str, typer.Argument(help="sft, reward or ppo.")],
    data: Data, base: Base = "nano", held_out: HeldOut = None,
    reward: Annotated[str | None, typer.Option(help="Checkpoint of the reward model, for ppo.")] = None,
    rollouts: Rollouts = "local", scores: Scores = "local", hardest_share: Hardest = 1.0, judge: HeldOutJudge = None,
    config: Config = None, entries: Set = None, publish: Publish = None, gate: Gate = None,
) -> None:  # fmt: skip
    """Send a training job to the hosted system (EDITX_BUS_URL, EDITX_JOBS_URL, EDITX_STORE_URL) and print its id.

    Data sets that are folders here, and a judge's file, are put into the artifact store, where every worker finds them.
    """
    from services.trainer.data.manifest import Dataset
    from services.trainer.jobs import check_gate, publish_judge, require_published
    from shared.jobs import machine
    from shared.publishing import publish_step
    from shared.schemas import JobRequest
    from shared.schemas.request import TrainingRequest
    from shared.service import ServiceSettings
    from shared.wiring import open_bus, open_jobs, open_store

    settings = _settings(base, data, held_out, reward, config, entries, publish, gate, rollouts, scores, hardest_share,
                         judge)  # fmt: skip
    check_gate(recipe, settings)
    surroundings = ServiceSettings()
    local = {name: Path(source) for name in ("dataset", "held_out")
             if (source := getattr(settings, name)) and Path(source).exists()}  # fmt: skip
    for source in {settings.dataset, settings.held_out} - {None, *(str(path) for path in local.values())}:
        require_published(open_store(surroundings.store_url), str(source))
    heard = settings.judge is not None and Path(settings.judge).is_file()
    if local or heard:
        store = open_store(surroundings.store_url)
        stored = {name: Dataset.load(path).publish(store) for name, path in local.items()}
        if settings.judge is not None and heard:
            stored["judge"] = publish_judge(Path(settings.judge), store)
        settings = settings.model_copy(update=stored)
    bus, jobs = open_bus(surroundings.bus_url), open_jobs(surroundings.jobs_url)
    training = TrainingRequest(recipe=recipe, settings=settings.model_dump(mode="json"))
    accepted = machine.accept(JobRequest(training=training, lane="batch"), jobs.now())
    job = publish_step(bus, jobs, jobs.create(accepted.job, accepted.events).job)
    typer.echo(job.id)
    bus.close()
    jobs.close()


def _settings(
    base: str, data: str, held_out: str | None, reward: str | None, config: Path | None, entries: list[str] | None,
    publish: str | None, gate: list[str] | None, rollouts: str = "local", scores: str = "local",
    hardest_share: float = 1.0, judge: str | None = None,
) -> TrainingSettings:  # fmt: skip
    from services.trainer.core.configs import parse_assignments, read_config
    from services.trainer.jobs import parse_settings

    merged: dict[str, Any] = read_config(config) if config else {}
    _merge(merged, parse_assignments(entries or []))
    return parse_settings({
        "base": base, "dataset": data, "held_out": held_out, "reward": reward, "judge": judge, "config": merged,
        "publish": publish, "gate": parse_assignments(gate or []), "rollouts": rollouts, "scores": scores,
        "hardest_share": hardest_share,
    })  # fmt: skip


def _merge(into: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def _run(recipe: str, settings: TrainingSettings, out: Path, device: str) -> None:
    """Train in this process (or this group of processes under torchrun), then publish if asked."""
    import os

    from editx.training import Served, training_place
    from services.trainer.core.runs import Bar, Silent, write_json
    from services.trainer.jobs import carry_out, publish
    from shared.checkpoints.layout import checkpoints_home
    from shared.wiring import open_store

    rank = int(os.environ.get("RANK", "0"))
    observer = Bar(recipe) if rank == 0 else Silent()
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(device)
    store = open_store(os.environ.get("EDITX_STORE_URL") or f"file://{(out / 'store').absolute()}")
    with _measured(), closing(Served()) as served:
        measures = carry_out(recipe, settings, training_place(out, store, device, observer, served))
    if rank == 0:
        write_json(out / "measures.json", measures)
        live = publish(settings, measures, out, checkpoints_home())
        typer.echo(json.dumps({"checkpoint": str(live or out / "checkpoint"), **measures}))


@contextmanager
def _measured() -> Iterator[None]:
    """Metrics of the run go to the collector at EDITX_OTLP_ENDPOINT, where there is one."""
    from shared import telemetry
    from shared.service import ServiceSettings

    endpoint = ServiceSettings().otlp_endpoint
    if endpoint is None:
        yield
        return
    end = telemetry.configure("trainer", otlp_endpoint=endpoint)
    try:
        yield
    finally:
        end()
