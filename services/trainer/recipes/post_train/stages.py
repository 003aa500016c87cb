"""The stages of a post-training, each a function of the work folder; one that is done is skipped.

judges and data need the material (recordings); the others need only the folder and the base checkpoint. How a
checkpoint is served is the caller's: `serve` makes the inference port for one. Knows no service.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.trainer.core.export import write_checkpoint
from services.trainer.core.plots import draw_histograms
from services.trainer.core.runs import Observer
from services.trainer.core.sampling import Vocabulary, bounds_for, draw
from services.trainer.data.checks import HeldOut, check_leaks, statistics
from services.trainer.data.manifest import collect
from services.trainer.data.margin import MarginScorer, Thresholds, keep_large_margins
from services.trainer.data.preferences import Candidate, Weights, make_pairs
from services.trainer.data.rows import Row
from services.trainer.evaluate.acoustic import AcousticJudge, pair_features
from services.trainer.evaluate.benchmark import Case, read_cases, write_cases
from services.trainer.evaluate.report import bootstrap, summarise, write_report
from services.trainer.evaluate.runner import (
    Measures,
    NoMeasures,
    OfflineJudge,
    Setup,
    add_measures,
    at_16k,
    read_results,
    run,
)
from services.trainer.evaluate.system import PortSystem
from services.trainer.ppo.rollouts import LocalRollouts, LocalScorer
from services.trainer.ppo.trainer import PpoTrainer, as_critic, hardest, prompts_of
from services.trainer.recipes.post_train.config import PostTrainConfig
from services.trainer.recipes.post_train.listening import TASKS, fit_judge, fit_margins, rate
from services.trainer.recipes.post_train.material import NEUTRAL, Item, Material, edit_towards
from services.trainer.recipes.post_train.workplace import Workplace
from services.trainer.reward.trainer import RewardTrainer
from services.trainer.sft.trainer import SftTrainer
from shared.audio.io import write_audio
from shared.checkpoints.layout import Checkpoint
from shared.checkpoints.reward import load_reward
from shared.checkpoints.step1 import load_step1, load_text_tokenizer
from shared.codes import Codes
from shared.errors import UserError
from shared.inference.port import Inference
from shared.models.step1 import Step1

log = logging.getLogger(__name__)

Serve = Callable[[Path, str], Inference]
"""Checkpoint folder and device -> the models "tokenizer", "llm" and "decoder" of it."""

SETS = ("unfiltered", "large_margin")
SYSTEMS = ("base", "sft_unfiltered", "sft_large_margin", "ppo")
BEST_OF = 8


@dataclass(eq=False)
class PostTrain:
    """One post-training. `material` may be None for stages that need no recordings."""

    config: PostTrainConfig
    base: Checkpoint
    root: Path
    serve: Serve
    material: Material | None = None
    measures: Measures | None = None
    observer: Observer | None = None

    @cached_property
    def work(self) -> Workplace:
        return Workplace(self.root)

    @cached_property
    def tokenizer(self) -> Any:
        return load_text_tokenizer(self.base)

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer.audio_offset, self.tokenizer.eos)

    def run(self, stages: Sequence[str] = ()) -> None:
        """The named stages, or all, in order; raises UserError for an unknown one."""
        unknown = set(stages) - set(STAGES)
        if unknown:
            raise UserError(f"There is no stage {', '.join(sorted(unknown))}.", f"Known: {', '.join(STAGES)}.")
        for name, stage in STAGES.items():
            if name == "measure" and self.measures is None:
                continue  # the rest of the table needs none of its models
            if (not stages or name in stages) and not self.work.is_done(name):
                log.info("post-training: %s", name)
                summary = stage(self)
                self.work.finish(name, summary)

    def judges(self) -> dict[str, Any]:
        """Fit both judges and the margin scorer, each on recordings of its own."""
        material, system = self._material(), self._system(self.base.root)
        report = {}
        for name in ("judge_a", "judge_b"):
            part: Any = name
            judge, accuracy = fit_judge(material, part, system, self.config.judge_pairs, self.config.workers)
            judge.save(self.root / f"{name}.json")
            report[name] = accuracy
        fit_margins(material, self._judge("judge_a"), self.config.judge_pairs).save(self.root / "margin.json")
        return report

    def data(self) -> dict[str, Any]:
        """Margins for a pool of pairs, two SFT sets of one size, clones, prompts with references, the benchmark."""
        c, material = self.config, self._material()
        scorer, system = MarginScorer.load(self.root / "margin.json"), self._system(self.base.root)
        pool = [self._scored(scorer, *pair) for pair in material.pairs("sft", TASKS)[: 3 * c.pairs]]
        kept = keep_large_margins(pool, Thresholds())
        size = min(c.pairs, len(kept.rows))
        order = np.random.default_rng((c.seed, 1)).permutation(len(pool))[:size]
        others = [*material.clones(c.clones, c.seed).rows, *material.rehearsal(c.rehearsal, c.seed)]
        rows = {"unfiltered": [pool[k] for k in order], "large_margin": kept.rows[:size]}
        held_out = HeldOut.of("benchmark", [material.row(i, i, edit_towards("emotion/happy"))
                                            for i in material.benchmark])  # fmt: skip
        summary: dict[str, Any] = {"pool": len(pool), "kept": len(kept.rows)}
        for name in SETS:
            dataset = collect(name, [*rows[name], *others], made_by={"seed": c.seed}, on_bad="skip")
            check_leaks(dataset.rows, [held_out])
            self.work.save(dataset)
            summary[name] = statistics(dataset)
        for name, part, count in (("prompts", "prompts", c.prompts), ("held_out", "held_out", c.held_out)):
            where: Any = part
            pairs = material.pairs(where, TASKS)[:count]
            prompts = [material.row(source, target, edit_towards(target.manner)) for source, target in pairs]
            check_leaks(prompts, [held_out])
            for row, (source, _) in zip(prompts, pairs, strict=True):
                self.work.keep_reference(system, row, source.audio())
            self.work.save(collect(name, prompts, on_bad="skip"))
        margins = {
            "all": [m for v in kept.before.values() for m in v],
            "kept": [m for v in kept.after.values() for m in v],
        }
        draw_histograms(margins, self.root / "margins.png", "margins before and after the threshold")
        summary["cases"] = self._write_benchmark(material)
        return summary

    def sft(self, name: str) -> dict[str, Any]:
        """Fine-tune the base on one of the two sets, and write the checkpoint."""
        dataset = self.work.dataset(name)
        model = load_step1(self.base, dtype=torch.float32, device=self.config.device)
        trainer = SftTrainer(model, self.tokenizer, dataset.rows, self.config.sft, self.work.run(f"sft_{name}"),
                             data={name: dataset.content_hash}, observer=self.observer)  # fmt: skip
        trainer.train()
        self._write(f"sft_{name}", trainer.state(), {"stage": "sft", "data": dataset.version})
        return {"steps": trainer.run.total, "left_out": trainer.left_out, "data": dataset.version}

    def preferences(self) -> dict[str, Any]:
        """Candidates by the SFT model, made audible and rated; pairs for training and for the reward model's test."""
        c = self.config
        judges = [self._judge(name) for name in ("judge_a", "judge_b")]
        checkpoint = self.work.checkpoint("sft_large_margin")
        model, system = self._model(Checkpoint(checkpoint)), self._system(checkpoint)
        summary: dict[str, Any] = {}
        for name in ("prompts", "held_out"):
            rows = [row for row in self.work.dataset(name).rows for _ in range(c.candidates)]
            answers = self._draw(model, rows, seed=c.seed + (name == "held_out"))
            ratings = rate(self.work, rows, answers, judges, system, Weights(), c.workers)
            candidates = [
                Candidate(id=f"{row.id}.{k % c.candidates}", prompt=row.id, mixed=mixed)
                for k, (row, mixed) in enumerate(zip(rows, answers, strict=True))
            ]  # fmt: skip
            scores = {one.id: rating[0] for one, rating in zip(candidates, ratings, strict=True)}
            pairs = make_pairs({row.id: row for row in rows}, candidates, scores, margin=c.judge_margin,
                               rated_by="acoustic judge a", per_prompt=c.pairs_per_prompt)  # fmt: skip
            self.work.save(collect(f"preferences_{name}", pairs, on_bad="skip"))
            lines = [one.model_dump(mode="json") | {"judge_a": r[0], "judge_b": r[1]}
                     for one, r in zip(candidates, ratings, strict=True)]  # fmt: skip
            self.work.write_lines(f"candidates_{name}.jsonl", lines)
            summary[name] = {
                "candidates": len(candidates),
                "pairs": len(pairs),
                "mean": float(np.mean([*scores.values()])),
            }
        return summary

    def reward(self) -> dict[str, Any]:
        """Train the reward model from the SFT weights; accuracy on held-out pairs, and best of 8 by the other judge."""
        base = Checkpoint(self.work.checkpoint("sft_large_margin"))
        dataset, held_out = self.work.dataset("preferences_prompts"), self.work.dataset("preferences_held_out")
        if not dataset.rows:
            raise UserError("No pair of candidates is as far apart as judge_margin asks.",
                            "Lower judge_margin in the config, or draw more candidates.", "no_preferences")  # fmt: skip
        trunk = load_step1(base, dtype=torch.float32, device=self.config.device)
        trainer = RewardTrainer(trunk, self.tokenizer, dataset.rows, self.config.reward, self.work.run("reward"),
                                data={"preferences": dataset.content_hash}, observer=self.observer)  # fmt: skip
        trainer.train()
        trainer.save(base, self.work.checkpoint("reward"))
        report = trainer.evaluate(held_out.rows, self.tokenizer) if held_out.rows else {}
        return {"train_pairs": len(dataset.rows), "held_out": report, "best_of": self._best_of(trainer)}

    def ppo(self) -> dict[str, Any]:
        """PPO from the large-margin SFT model on the prompts that were hardest for it."""
        c, base = self.config, Checkpoint(self.work.checkpoint("sft_large_margin"))
        rows = self.work.dataset("prompts").rows
        scores: dict[str, list[float]] = {}
        for line in self.work.read_lines("candidates_prompts.jsonl"):
            scores.setdefault(line["prompt"], []).append(line["judge_a"])
        hard = hardest(rows, [float(np.mean(scores[row.id])) for row in rows], c.hardest_share)
        watched = list(self.work.dataset("held_out").rows)
        system, judge = self._system(base.root), self._judge("judge_a")

        def listen(places: Sequence[int], answers: Sequence[Codes]) -> float:
            ratings = rate(self.work, [watched[k] for k in places], answers, [judge], system, Weights(), c.workers)
            return float(np.mean([rating[0] for rating in ratings])) / 10

        trainer = PpoTrainer(
            self._model(base, torch.float32), as_critic(self._reward()), self._model(base, torch.float32),
            prompts_of(self.tokenizer, hard, c.ppo),
            LocalRollouts(self._model(base), self.vocabulary, slots=c.slots),
            LocalScorer(self._reward(), self.vocabulary), self.vocabulary, c.ppo, self.work.run("ppo"),
            watched=prompts_of(self.tokenizer, watched, c.ppo), judge=listen,
            data={"prompts": self.work.dataset("prompts").content_hash}, observer=self.observer,
        )  # fmt: skip
        trainer.train()
        self._write("ppo", trainer.state(), {"stage": "ppo", "prompts": len(hard)})
        return {"prompts": len(hard), "checks": trainer.watch.checks}

    def evaluate(self) -> dict[str, Any]:
        """The benchmark for every system, by the judge that made no preference; the report with its table."""
        c = self.config
        cases = read_cases(self.root / "benchmark" / "cases.jsonl")
        judge = OfflineJudge(self._judge("judge_b"))
        for name in SYSTEMS:
            checkpoint = self.base.root if name == "base" else self.work.checkpoint(name)
            run(cases, self._system(checkpoint), judge, self.root / "evaluation" / name,
                Setup(c.iterations, c.seed, c.workers))  # fmt: skip
        return self._report()

    def measure(self) -> dict[str, Any]:
        """Words, voice and naturalness of the benchmark's recordings; the report again."""
        cases = read_cases(self.root / "benchmark" / "cases.jsonl")
        for name in SYSTEMS if self.measures is not None else ():
            add_measures(cases, self.root / "evaluation" / name, self.measures or NoMeasures())
        return self._report()

    def _report(self) -> dict[str, Any]:
        results: dict[str, Any] = {name: read_results(self.root / "evaluation" / name) for name in SYSTEMS}
        report = write_report(results, self.root / "evaluation")
        tables = {
            name: [{**row, "score": str(row["score"])} for row in summarise(lines)]
            for name, lines in results.items()
            if any("iterations" in line for line in lines)
        }
        failed = sum("error" in line for lines in results.values() for line in lines)
        return {"report": str(report), "failed": failed, "systems": tables}

    def _material(self) -> Material:
        if self.material is None:
            raise UserError("This stage needs recordings, and no material is here.",
                            "Run judges and data where the corpus lies.", "no_material")  # fmt: skip
        return self.material

    def _judge(self, name: str) -> AcousticJudge:
        return AcousticJudge.load(self.root / f"{name}.json")

    def _system(self, checkpoint: Path) -> PortSystem:
        return PortSystem(self.serve(checkpoint, self.config.device), self.tokenizer, self.config.decode_steps)

    def _model(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Step1:
        """A language model on the config's device; by default in the dtype that runs fastest there."""
        model = load_step1(checkpoint, dtype=dtype, device=self.config.device)
        model.attention = self.config.sft.loop.attention
        return model

    def _reward(self) -> Any:
        path = Checkpoint(self.work.checkpoint("reward"))
        model, _ = load_reward(path, dtype=torch.float32, device=self.config.device)
        model.trunk.attention = self.config.reward.loop.attention
        return model

    def _write(self, name: str, state: dict[str, torch.Tensor], facts: dict[str, object]) -> None:
        write_checkpoint(self.base, self.work.checkpoint(name), state, name=f"{self.base.metadata.name}-{name}",
                         version=self.base.metadata.version, facts=facts)  # fmt: skip

    def _scored(self, scorer: MarginScorer, source: Item, target: Item) -> Row:
        edit = edit_towards(target.manner)
        margin = scorer.score(pair_features(at_16k(source.audio()), at_16k(target.audio())), str(edit))
        return self._material().row(source, target, edit, margin)

    def _draw(self, model: Step1, rows: Sequence[Row], seed: int) -> list[Codes]:
        c = self.config
        prompts = [np.asarray(self.tokenizer.encode_chat(row.turns()), np.int64) for row in rows]
        limits = [bounds_for(len(row.source.mixed), c.ppo.max_stretch, c.ppo.extra_groups) for row in rows]
        answers = draw(model, prompts, limits, self.vocabulary, temperature=c.temperature, seed=seed, slots=c.slots)
        return [answer.mixed for answer in answers]

    def _best_of(self, trainer: RewardTrainer) -> dict[str, float]:
        """Judge b's mean rating of the candidate that the reward model picks among 8, and of a candidate at random."""
        rows = {row.id: row for row in self.work.dataset("held_out").rows}
        groups: dict[str, list[dict[str, Any]]] = {}
        for line in self.work.read_lines("candidates_held_out.jsonl"):
            groups.setdefault(line["prompt"], []).append(line)
        gains, picked, mean = [], [], []
        for prompt, lines in groups.items():
            few = lines[:BEST_OF]
            answers = [Candidate(**{k: line[k] for k in ("id", "prompt", "mixed")}).mixed for line in few]
            rewards = trainer.score(rows[prompt], answers, self.tokenizer)
            best = few[int(np.argmax(rewards))]["judge_b"]
            picked.append(best)
            mean.append(float(np.mean([line["judge_b"] for line in few])))
            gains.append(picked[-1] - mean[-1])
        gain = bootstrap(gains)
        return {"picked": float(np.mean(picked)), "random": float(np.mean(mean)), "gain": gain.mean, "low": gain.low,
                "high": gain.high}  # fmt: skip

    def _write_benchmark(self, material: Material) -> int:
        """Held-out voices and texts in the published format: every label in turn, every voice in turn."""
        folder = self.root / "benchmark"
        folder.mkdir(exist_ok=True)
        neutral = [item for item in material.benchmark if item.manner == NEUTRAL]
        manners = sorted({i.manner for i in material.training if i.manner.partition("/")[0] in TASKS})
        rng = np.random.default_rng((self.config.seed, 3))
        cases = []
        for number in range(self.config.cases if len(neutral) > 1 else 0):
            prompt = neutral[int(rng.integers(len(neutral)))]
            texts = [i.text for i in neutral if i.language == prompt.language and i.text != prompt.text]
            if not texts:
                continue
            task, _, label = manners[number % len(manners)].partition("/")
            write_audio(prompt.audio(), folder / f"{prompt.id}.flac", "flac")
            cases.append(Case(
                id=str(number), speaker=prompt.speaker, gen_text=texts[int(rng.integers(len(texts)))],
                prompt_audio=f"{prompt.id}.flac", prompt_text=prompt.text, lang=prompt.language,
                task=task, task_sub=label,  # type: ignore[arg-type]
            ))  # fmt: skip
        write_cases(cases, folder / "cases.jsonl")
        return len(cases)


STAGES: dict[str, Callable[[PostTrain], dict[str, Any]]] = {
    "judges": PostTrain.judges,
    "data": PostTrain.data,
    "sft_unfiltered": lambda post: post.sft("unfiltered"),
    "sft_large_margin": lambda post: post.sft("large_margin"),
    "preferences": PostTrain.preferences,
    "reward": PostTrain.reward,
    "ppo": PostTrain.ppo,
    "evaluate": PostTrain.evaluate,
    "measure": PostTrain.measure,
}
"""Name to stage, in order."""
