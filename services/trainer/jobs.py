"""Training as jobs: a recipe by name with plain settings, carried out in a folder, measured, gated and published.

Settings: "base" (checkpoint), "dataset" (a prefix in the artifact store or a folder), "held_out" (the same, for the
measures), "config" (entries of the stage's dataclass), for ppo "reward" (checkpoint of the reward model), "rollouts"
and "scores" (where they come from) and "hardest_share" (train on the prompts whose answers by the base score lowest);
"judge" (a file of the acoustic judge, by path or key in the store, or gemini:MODEL, openai:MODEL) watches ppo's answers
to held_out beside the reward; "publish" (name of the new checkpoint) and "gate" ({measure: lowest value}) for
publishing. Knows no bus.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.trainer.core.configs import with_entries
from services.trainer.core.distributed import Group, join_group, leave_group
from services.trainer.core.export import write_checkpoint, write_sums
from services.trainer.core.hashes import weights_hash
from services.trainer.core.runs import Observer
from services.trainer.core.sampling import Vocabulary
from services.trainer.data.manifest import SUMS, Dataset, fetch
from services.trainer.data.rows import Row, reason
from services.trainer.evaluate.acoustic import AcousticJudge
from services.trainer.evaluate.asking import JudgeSettings, is_remote
from services.trainer.evaluate.hearing import Hearing
from services.trainer.evaluate.remote import Judge
from services.trainer.evaluate.system import PortSystem
from services.trainer.ppo.config import PpoConfig
from services.trainer.ppo.rollouts import Scorer
from services.trainer.ppo.sources import MakeRollouts, MakeScorer, Request, ServeModels, local_rollouts, local_scorer
from services.trainer.ppo.trainer import PpoTrainer, as_critic, hardest, prompts_of, start_scores
from services.trainer.reward.trainer import RewardConfig, RewardTrainer, make_pairs
from services.trainer.sft.trainer import SftConfig, SftTrainer, evaluate_loss
from shared.checkpoints.layout import Checkpoint
from shared.checkpoints.manifest import sha256
from shared.checkpoints.reward import FOLDER, load_reward, reward_folder
from shared.checkpoints.step1 import load_step1, load_text_tokenizer
from shared.errors import PermanentError, UserError
from shared.prompts import TextTokenizer
from shared.store.port import ArtifactNotFound, ArtifactStore, InvalidKey


class TrainingSettings(BaseModel):
    """The settings of a training job."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    dataset: str
    held_out: str | None = None
    reward: str | None = None
    judge: str | None = None
    rollouts: Literal["local", "engine", "pool"] = "local"
    scores: Literal["local", "pool"] = "local"
    hardest_share: float = Field(default=1.0, gt=0, le=1)
    config: dict[str, Any] = Field(default_factory=dict)
    publish: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    gate: dict[str, float] = Field(default_factory=dict)


class GateFailed(PermanentError):
    """The trained model is not better where the gate asks for it; nothing was published."""

    default_code = "gate_failed"


@dataclass(frozen=True)
class Place:
    """Where a job works: its folder, the store for data sets, the device, who watches, who draws and scores PPO's
    answers, and what decodes them for a judge."""

    folder: Path
    store: ArtifactStore
    device: str
    observer: Observer
    rollouts: Mapping[str, MakeRollouts] = field(default_factory=lambda: {"local": local_rollouts})
    scorers: Mapping[str, MakeScorer] = field(default_factory=lambda: {"local": local_scorer})
    serve: ServeModels | None = None

    def dataset(self, source: str) -> Dataset:
        """A data set by folder, or by prefix in the store. Raises UserError for none, and for one without rows."""
        path = Path(source)
        if not path.exists():
            require_published(self.store, source)
        found = Dataset.load(path) if path.exists() else fetch(self.store, source, self.folder)
        if not found.rows:
            raise UserError(f"The data set {source} has no rows.", code="invalid_dataset")
        return found

    def judge(self, name: str) -> tuple[Judge, str]:
        """A judge by its file, by the file's key in the store, or by its model; and what it is, in a hash or name."""
        cache = self.folder / "judge-cache"
        if is_remote(name):
            return JudgeSettings().open(name, cache), name
        path = Path(name)
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "judge.json"
            try:
                path.write_bytes(self.store.get(name))
            except (ArtifactNotFound, InvalidKey) as error:
                raise UserError(f"There is no judge {name}: neither a file here nor in the store.",
                                "Fit one with `editx eval fit-judge`.", "judge_not_found") from error  # fmt: skip
        return JudgeSettings().open(str(path), cache), sha256(path)


Measures = dict[str, float]
Recipe = Callable[[TrainingSettings, Place], Measures]
GROUP_ACCURACY = "accuracy "
HELD_OUT_REPORT, PROMPTS = "held_out.json", "prompts.json"
MEASURED: dict[str, tuple[str, ...]] = {
    "sft": ("held_out_loss", "loss_gain"),
    "reward": ("accuracy", "standard_error", "calibration_error"),
    "ppo": ("watched_reward_gain",),
}
"""What each recipe measures on held_out; reward also "accuracy GROUP" for every group of its pairs, and ppo JUDGE_GAIN
where it has a judge."""
JUDGE_GAIN = "judge_gain"


def require_published(store: ArtifactStore, source: str) -> None:
    """Raises UserError where the store has no data set under a prefix."""
    try:
        store.stat(f"{source}/{SUMS}")
    except (ArtifactNotFound, InvalidKey) as error:
        raise UserError(f"There is no data set {source}: neither a folder here nor a prefix in the store.",
                        "`editx data build` makes one, `editx data publish` puts it there.",
                        "dataset_not_found") from error  # fmt: skip


def publish_judge(path: Path, store: ArtifactStore) -> str:
    """Put a judge's file into the store; its key there. Raises UserError for a file that is none."""
    AcousticJudge.load(path)
    content = path.read_bytes()
    key = f"judges/{hashlib.sha256(content).hexdigest()}.json"
    store.put(key, content, content_type="application/json")
    return key


def parse_settings(settings: Mapping[str, Any]) -> TrainingSettings:
    """Raises UserError naming what is wrong."""
    try:
        return TrainingSettings.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"The training settings are wrong: {reason(error)}.", code="invalid_training") from error


def check_gate(recipe: str, settings: TrainingSettings) -> None:
    """Raises UserError for an unknown recipe, and for a gate on a measure that the job would not produce."""
    if recipe not in RECIPES:
        raise UserError(f"There is no recipe {recipe!r}.", f"Known: {', '.join(RECIPES)}.", "unknown_recipe")
    if settings.gate and settings.held_out is None:
        raise UserError(f"The gate asks for {', '.join(settings.gate)}, which is measured on held-out data.",
                        "Give held_out, or no gate.", "invalid_training")  # fmt: skip
    if settings.judge is not None and (recipe != "ppo" or settings.held_out is None):
        raise UserError("A judge watches ppo's answers to held_out prompts.",
                        "Give held_out to a ppo job, or no judge.", "invalid_training")  # fmt: skip
    measured = MEASURED[recipe] + ((JUDGE_GAIN,) if settings.judge is not None else ())
    for name in settings.gate:
        if name not in measured and not (recipe == "reward" and name.startswith(GROUP_ACCURACY)):
            raise UserError(f"The gate asks for {name}, which {recipe} does not measure.",
                            f"Measured: {', '.join(measured)}.", "invalid_training")  # fmt: skip


def carry_out(recipe: str, settings: TrainingSettings, place: Place) -> Measures:
    """Train (from the folder's state if there is one) into folder/checkpoint; the measures. Raises UserError."""
    check_gate(recipe, settings)
    measures = RECIPES[recipe](settings, place)
    leave_group()
    return measures


def publish(settings: TrainingSettings, measures: Measures, folder: Path, target: Path) -> Path | None:
    """Put folder/checkpoint under `target`/name if the gate lets it; None when nothing is to be published.

    The new folder takes the old one's place in one rename. Raises GateFailed naming the measure.
    """
    for name, least in settings.gate.items():
        if name not in measures:
            raise GateFailed(f"The gate asks for {name}, which was not measured.",
                             f"Measured: {', '.join(measures) or 'nothing'}; give held_out.")  # fmt: skip
        if measures[name] < least:
            raise GateFailed(f"{name} is {measures[name]:.4g}, the gate asks for {least:g}. Nothing was published.",
                             "Train longer or on other data.")  # fmt: skip
    if settings.publish is None:
        return None
    live, fresh = target / settings.publish, target / f".{settings.publish}.new"
    target.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(folder / "checkpoint", fresh)
    old = target / f".{settings.publish}.old"
    shutil.rmtree(old, ignore_errors=True)
    if live.exists():
        live.rename(old)
    fresh.rename(live)
    shutil.rmtree(old, ignore_errors=True)
    return live


def _loop(settings: TrainingSettings, place: Place) -> dict[str, Any]:
    """The config's entries with the worker's device."""
    loop = {**settings.config.get("loop", {}), "device": place.device}
    return {**settings.config, "loop": loop}


def _sft(settings: TrainingSettings, place: Place) -> Measures:
    base, dataset = Checkpoint.resolve(settings.base), place.dataset(settings.dataset)
    config = with_entries(SftConfig(), _loop(settings, place))
    tokenizer = load_text_tokenizer(base)
    model = load_step1(base, dtype=torch.float32, device=place.device)
    data, held_out = _read(settings, place, base, dataset)
    before = evaluate_loss(model, tokenizer, held_out.rows, config) if held_out.rows else 0.0
    trainer = SftTrainer(model, tokenizer, dataset.rows, config, place.folder / "run",
                         data=data, observer=place.observer)  # fmt: skip
    trainer.train()
    _write(settings, place, base, trainer.state(), "sft", dataset, trainer.group)
    if not held_out.rows:
        return {}
    after = evaluate_loss(trainer.model, tokenizer, held_out.rows, config)
    return {"held_out_loss": after, "loss_gain": before - after}


def _reward(settings: TrainingSettings, place: Place) -> Measures:
    base, dataset = Checkpoint.resolve(settings.base), place.dataset(settings.dataset)
    config = with_entries(RewardConfig(), _loop(settings, place))
    data, held_out = _read(settings, place, base, dataset)
    tokenizer = load_text_tokenizer(base)
    make_pairs(tokenizer, held_out.rows)  # bad ones are named before the training, not after it
    trunk = load_step1(base, dtype=torch.float32, device=place.device)
    trainer = RewardTrainer(trunk, tokenizer, dataset.rows, config, place.folder / "run",
                            data=data, observer=place.observer)  # fmt: skip
    trainer.train()
    untouched = load_step1(base, dtype=torch.float32).state_dict()
    target = place.folder / "checkpoint"
    _write(settings, place, base, untouched, "reward", dataset, trainer.group)
    trainer.save(base, target / FOLDER)
    if trainer.group.is_main:
        write_sums(target)
    if not held_out.rows:
        return {}
    report = trainer.evaluate(held_out.rows, tokenizer)
    trainer.run.note(HELD_OUT_REPORT, report)
    groups = {f"{GROUP_ACCURACY}{name}": group["accuracy"] for name, group in report["groups"].items()}
    return {name: report[name] for name in MEASURED["reward"]} | groups


def _ppo(settings: TrainingSettings, place: Place) -> Measures:
    if settings.reward is None:
        raise UserError("A ppo job needs reward: the checkpoint of the reward model.", code="invalid_training")
    base, scored = Checkpoint.resolve(settings.base), Checkpoint.resolve(settings.reward)
    dataset = place.dataset(settings.dataset)
    data, watched = _read(settings, place, base, dataset)
    judge = _hearing(settings, place, base, watched, data)
    data["reward"] = weights_hash(reward_folder(scored).glob("*.safetensors"))
    config = with_entries(PpoConfig(), _loop(settings, place))
    tokenizer = load_text_tokenizer(base)
    vocabulary = Vocabulary(tokenizer.audio_offset, tokenizer.eos)
    actor, reference = (load_step1(base, dtype=torch.float32, device=place.device) for _ in range(2))
    critic, _ = load_reward(scored, dtype=torch.float32, device=place.device)
    request = Request(base, scored, vocabulary, config, place.device)
    scorer = _source(place.scorers, settings.scores, "scores")(request)
    rows = dataset.rows
    if settings.hardest_share < 1:
        rows = _hardest(settings, place, dataset, request, tokenizer, scorer)
        data["prompts"] = replace(dataset, rows=rows).content_hash
    rollouts = _source(place.rollouts, settings.rollouts, "rollouts")(request)
    try:
        trainer = PpoTrainer(
            actor, as_critic(critic), reference, prompts_of(tokenizer, rows, config), rollouts, scorer,
            vocabulary, config, place.folder / "run", watched=prompts_of(tokenizer, watched.rows, config),
            judge=judge, data=data, observer=place.observer,
        )  # fmt: skip
        if settings.hardest_share < 1:
            trainer.run.note(PROMPTS, {"share": settings.hardest_share, "ids": [row.id for row in rows]})
        trainer.train()
    finally:
        rollouts.close()
    _write(settings, place, base, trainer.state(), "ppo", dataset, trainer.group)
    return trainer.gains()


def _read(
    settings: TrainingSettings, place: Place, base: Checkpoint, dataset: Dataset
) -> tuple[dict[str, str], Dataset]:  # fmt: skip
    """Hashes of what every recipe reads, and the held-out set, without rows where there is none."""
    data = {"dataset": dataset.content_hash, "base": weights_hash(base.step1_files)}
    if settings.held_out is None:
        return data, Dataset("none", ())
    held_out = place.dataset(settings.held_out)
    return data | {"held_out": held_out.content_hash}, held_out


def _hearing(
    settings: TrainingSettings, place: Place, base: Checkpoint, watched: Dataset, data: dict[str, str]
) -> Hearing | None:  # fmt: skip
    """The held-out judge, where there is one; what it is goes to the hashes of what the run reads."""
    if settings.judge is None:
        return None
    if place.serve is None:
        raise UserError("A judge needs the models that decode what it is to hear, and none are here.",
                        "Set EDITX_TRAINER_REWARD_URL to a server of tokenizer, decoder and reward.",
                        "invalid_training")  # fmt: skip
    judge, data["judge"] = place.judge(settings.judge)
    system = PortSystem(place.serve(base, place.device), load_text_tokenizer(base))
    return Hearing(watched, system, judge)


def _hardest(
    settings: TrainingSettings, place: Place, dataset: Dataset, request: Request, tokenizer: TextTokenizer,
    scorer: Scorer,
) -> tuple[Row, ...]:  # fmt: skip
    """The rows whose answers by the base score lowest, as the run folder has them or drawn with the run's seed."""
    noted = place.folder / "run" / PROMPTS
    known: dict[str, Any] = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {}
    if known.get("share") == settings.hardest_share:
        return tuple(row for row in dataset.rows if row.id in set(known["ids"]))
    config = request.config
    group = join_group(config.loop.sharding, place.device)
    scores = start_scores(prompts_of(tokenizer, dataset.rows, config), local_rollouts(request), scorer,
                          config.temperature, config.loop.seed, group)  # fmt: skip
    return tuple(hardest(dataset.rows, scores, settings.hardest_share))


def _write(
    settings: TrainingSettings, place: Place, base: Checkpoint, state: Mapping[str, torch.Tensor], stage: str,
    dataset: Dataset, group: Group,
) -> None:  # fmt: skip
    """The trained checkpoint, by the first of several processes; the others wait for it."""
    name = settings.publish or f"{base.metadata.name}-{stage}"
    facts = {"stage": stage, "base": base.metadata.name, "dataset": f"{dataset.name}/{dataset.version}"}
    if group.is_main:
        write_checkpoint(base, place.folder / "checkpoint", state, name=name, version=dataset.version, facts=facts)
    group.wait()


Make = TypeVar("Make")


def _source(known: Mapping[str, Make], wanted: str, what: str) -> Make:
    if wanted not in known:
        raise UserError(f"There are no {what} of the kind {wanted!r} here.", f"Known: {', '.join(known)}.",
                        "invalid_training")  # fmt: skip
    return known[wanted]


RECIPES: dict[str, Recipe] = {"sft": _sft, "reward": _reward, "ppo": _ppo}
