"""The stages of a post-training, each a function of the work folder; one that is done is skipped.

record needs the readers, judges and data its recordings; the others need only the folder and the base checkpoint. How
a checkpoint is served is the caller's: `serve` makes the inference port for one. Knows no service.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.trainer.core.export import write_checkpoint, write_with_reward
from services.trainer.core.hashes import weights_hash
from services.trainer.core.plots import draw_histograms
from services.trainer.core.runs import Observer
from services.trainer.core.sampling import Vocabulary, bounds_for, draw
from services.trainer.data.checks import HeldOut, check_leaks, statistics
from services.trainer.data.manifest import Dataset, collect
from services.trainer.data.margin import MarginScorer, Thresholds, keep_large_margins
from services.trainer.data.preferences import Candidate, make_pairs
from services.trainer.data.rows import Row
from services.trainer.evaluate.acoustic import AcousticJudge, pair_features
from services.trainer.evaluate.benchmark import read_cases
from services.trainer.evaluate.report import bootstrap, over_seeds, summarise, write_report
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
from services.trainer.evaluate.same_words import SameWords, Table, code_distances
from services.trainer.evaluate.system import PortSystem
from services.trainer.ppo.rollouts import LocalRollouts, LocalScorer
from services.trainer.ppo.trainer import PpoTrainer, as_critic, hardest, prompts_of
from services.trainer.recipes.post_train.config import PostTrainConfig
from services.trainer.recipes.post_train.iterated import iterate
from services.trainer.recipes.post_train.listening import (
    TASKS,
    Ears,
    Heard,
    fit_judge,
    fit_margins,
    fit_words,
    relabelled,
)
from services.trainer.recipes.post_train.material import NEUTRAL, Item, Material, Part, edit_towards
from services.trainer.recipes.post_train.outcome import write_benchmark, write_outcome
from services.trainer.recipes.post_train.readers import Reader
from services.trainer.recipes.post_train.recordings import Sentences, load, nano_sentences, plan, record
from services.trainer.recipes.post_train.workplace import Workplace
from services.trainer.reward.trainer import RewardTrainer
from services.trainer.sft.trainer import SftTrainer
from shared.checkpoints.layout import Checkpoint
from shared.checkpoints.reward import load_reward
from shared.checkpoints.step1 import load_step1, load_text_tokenizer
from shared.checkpoints.tokenizer import load_linguistic
from shared.codes import Codes
from shared.errors import UserError
from shared.inference.port import Inference
from shared.models.step1 import Step1
from shared.tags import bracketed_tags

log = logging.getLogger(__name__)

Serve = Callable[[Path, str], Inference]
"""Checkpoint folder and device -> the models "tokenizer", "llm" and "decoder" of it."""

SETS = ("unfiltered", "large_margin")
PROMPTS: tuple[Part, ...] = ("prompts", "held_out")
SYSTEMS = ("base", "sft_unfiltered", "sft_large_margin", "ppo", "best_of_8")
WORDS = "words.json"
BEST_OF = 8
ROWS_PER_PIECE = 4
STEPS = (("sft_unfiltered", "sft_large_margin"), ("sft_large_margin", "ppo"), ("base", "best_of_8"))
"""Which system is to beat which."""


@dataclass(eq=False)
class PostTrain:
    """One post-training. `readers` (the good teacher first) and `sentences` are wanted by the stage record alone."""

    config: PostTrainConfig
    base: Checkpoint
    root: Path
    serve: Serve
    readers: Callable[[], Sequence[Reader]] | None = None
    sentences: Sentences = nano_sentences
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
                began, spent = time.monotonic(), time.process_time()
                summary = stage(self)
                cost = {"wall_s": time.monotonic() - began, "cpu_s": time.process_time() - spent}
                self.work.finish(name, summary | {"cost_of_last_start": cost})

    def record(self) -> dict[str, Any]:
        """Have the teachers read everything, and code it; shard by shard."""
        if self.readers is None:
            raise UserError("The stage record needs teachers, and none is here.",
                            "Run it where the train extra is installed.", "no_readers")  # fmt: skip
        c, system, readers = self.config, self._system(self.base.root), self.readers()
        groups = plan(c.record, readers, self.sentences, c.seed)
        progress = self.observer.progress if self.observer is not None else lambda fraction, note: None
        return record(groups, readers, lambda waveform: system.tokenize(waveform).mixed, self.root / "recordings",
                      c.record, workers=c.workers, progress=progress)  # fmt: skip

    def judges(self) -> dict[str, Any]:
        """Fit both judges and the margin scorer, each on recordings of its own."""
        material, system = self._material(), self._system(self.base.root)
        report = {}
        for name in ("judge_a", "judge_b"):
            report[name] = self.work.once(f"{name}_accuracy.json", partial(self._fit_judge, name, material, system))
        fit_margins(material, self._judge("judge_a"), self.config.judge_pairs).save(self.root / "margin.json")
        try:
            fit_words(material, self._code_distances, self.config.judge_pairs).save(self.root / WORDS)
        except UserError as error:
            log.warning("answers will be rated without their words: %s", error)
        return report

    def _fit_judge(self, name: Any, material: Material, system: PortSystem) -> dict[str, Any]:
        judge, accuracy = fit_judge(material, name, system, self.config.judge_pairs, self.config.workers)
        judge.save(self.root / f"{name}.json")
        return dict(accuracy)

    def data(self) -> dict[str, Any]:
        """Margins for a pool of pairs, two SFT sets of one size, clones, prompts with references, the benchmark."""
        c, material = self.config, self._material()
        scorer, system = MarginScorer.load(self.root / "margin.json"), self._system(self.base.root)
        pool = [self._scored(material, scorer, *pair) for pair in material.pairs("sft", TASKS)[: 3 * c.pairs]]
        kept = keep_large_margins(pool, Thresholds())
        size = min(c.pairs, len(kept.rows))
        order = np.random.default_rng((c.seed, 1)).permutation(len(pool))[:size]
        others = [*material.clones(c.clones, c.seed).rows, *material.rehearsal(c.rehearsal, c.seed),
                  *material.sounds(c.sounds, c.seed)]  # fmt: skip
        rows = {"unfiltered": [pool[k] for k in order], "large_margin": kept.rows[:size]}
        held_out = HeldOut.of("benchmark", [material.row(i, i, edit_towards("emotion/happy"))
                                            for i in material.benchmark])  # fmt: skip
        if not size:
            raise UserError("No pair of recordings has a margin of 6 or more.",
                            "Record more groups, or raise record.strongest.", "no_large_margins")  # fmt: skip
        summary: dict[str, Any] = {"pool": len(pool), "kept": len(kept.rows)}
        for name in SETS:
            dataset = collect(name, [*rows[name], *others], made_by={"seed": c.seed}, on_bad="skip")
            check_leaks(dataset.rows, [held_out])
            self.work.save(dataset)
            summary[name] = statistics(dataset)
        for name in PROMPTS:
            pairs = material.pairs(name, TASKS)[: getattr(c, name)]
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
        summary["cases"] = write_benchmark(material, self.root / "benchmark", c.cases, c.seed)
        return summary

    def sft(self, name: str) -> dict[str, Any]:
        """Fine-tune the base on one of the two sets, and write the checkpoint."""
        dataset = self.work.dataset(name)
        model = load_step1(self.base, dtype=torch.float32, device=self.config.device)
        trainer = SftTrainer(model, self.tokenizer, dataset.rows, self.config.sft, self.work.run(f"sft_{name}"),
                             data={name: dataset.content_hash, "base": weights_hash(self.base.step1_files)},
                             observer=self.observer)  # fmt: skip
        trainer.train()
        self._write(f"sft_{name}", trainer.state(), {"stage": "sft", "data": dataset.version}, sounds_in(dataset.rows))
        return {"steps": trainer.run.total, "left_out": trainer.left_out, "data": dataset.version}

    def iterate(self) -> dict[str, Any]:
        """Let a share of the prompts start from what the SFT model says itself."""
        c, material = self.config, self._material()
        system = self._system(self.work.checkpoint("sft_large_margin"))
        summary: dict[str, Any] = {}
        for name in PROMPTS:
            rows = self.work.dataset(name).rows
            readings = [item for item in material.part(name) if item.manner == NEUTRAL]
            progress = self.observer.progress if self.observer is not None else lambda fraction, note: None
            own = iterate(rows, name, readings, system, self.work, share=c.own_sources, seed=c.seed, workers=c.workers,
                          progress=progress)  # fmt: skip
            self.work.save(collect(f"{name}_iterated", own, on_bad="skip"))
            summary[name] = {"rows": len(own), "own": sum(a.id != b.id for a, b in zip(own, rows, strict=True))}
        return summary

    def _asked(self, name: str) -> Sequence[Row]:
        return self.work.dataset(f"{name}_iterated").rows

    def preferences(self) -> dict[str, Any]:
        """Candidates by the SFT model, made audible and rated; pairs for training and for the reward model's test."""
        c = self.config
        ears = self._ears("judge_a", "judge_b")
        checkpoint = self.work.checkpoint("sft_large_margin")
        model, system = self._model(Checkpoint(checkpoint)), self._system(checkpoint)
        summary: dict[str, Any] = {}
        for name in PROMPTS:
            rows = self._asked(name)
            lines = self._candidates(name, rows, model, system, ears)
            candidates = [Candidate(**{k: line[k] for k in ("id", "prompt", "mixed")}) for line in lines]
            scores = {line["id"]: line["judge_a"] for line in lines}
            prompts = {row.id: row for row in rows}
            pairs = make_pairs(prompts, candidates, scores, margin=c.judge_margin, rated_by="acoustic judge a",
                               per_prompt=c.pairs_per_prompt)  # fmt: skip
            if name == "prompts":
                heard = [Heard(**line["heard"]) for line in lines]
                both = list(zip(candidates, heard, strict=True))
                more = relabelled(prompts, both, ears, c.judge_margin, c.relabelled, c.seed)
                self.work.save(collect("preferences_relabelled", more, on_bad="skip"))
                summary["relabelled"] = len(more)
            self.work.save(collect(f"preferences_{name}", pairs, on_bad="skip"))
            self.work.write_lines(f"candidates_{name}.jsonl", lines)
            summary[name] = {
                "candidates": len(candidates),
                "pairs": len(pairs),
                "mean": float(np.mean([*scores.values()])),
            }
        return summary

    def _candidates(
        self, name: str, rows: Sequence[Row], model: Step1, system: PortSystem, ears: Ears
    ) -> list[dict[str, Any]]:
        """Rated answers to every row, some rows at a time: the pieces that a killed run left are not made again."""
        c, lines = self.config, []
        for number, start in enumerate(range(0, len(rows), ROWS_PER_PIECE)):
            piece = f"candidates/{name}-{number:04d}.jsonl"
            if not (self.root / piece).exists():
                asked = [row for row in rows[start : start + ROWS_PER_PIECE] for _ in range(c.candidates)]
                answers = self._draw(model, asked, seed=(c.seed * 2 + (name == "held_out")) * 100_003 + number)
                found = ears.listen(self.work, asked, answers, system, c.workers)
                self.work.write_lines(piece, [
                    Candidate(id=f"{row.id}.{k % c.candidates}", prompt=row.id, mixed=mixed).model_dump(mode="json")
                    | {f"judge_{judge}": rating for judge, rating in zip("ab", ears.ratings(row, heard), strict=True)}
                    | {"heard": asdict(heard)}
                    for k, (row, mixed, heard) in enumerate(zip(asked, answers, found, strict=True))
                ])  # fmt: skip
            lines += self.work.read_lines(piece)
            if self.observer is not None:
                self.observer.progress(min(1.0, (start + ROWS_PER_PIECE) / len(rows)), f"answers to {name}")
        return lines

    def reward(self) -> dict[str, Any]:
        """Train the reward model from the SFT weights; accuracy on held-out pairs, and best of 8 by the other judge."""
        c, base = self.config, Checkpoint(self.work.checkpoint("sft_large_margin"))
        dataset, held_out = self.work.dataset("preferences_prompts"), self.work.dataset("preferences_held_out")
        readings = self._material().contrasts(c.contrasts, c.seed)
        more = self.work.dataset("preferences_relabelled")
        if not dataset.rows:
            raise UserError("No pair of candidates is as far apart as judge_margin asks.",
                            "Lower judge_margin in the config, or draw more candidates.", "no_preferences")  # fmt: skip
        trunk = load_step1(base, dtype=torch.float32, device=c.device)
        pairs = [*dataset.rows, *more.rows, *readings]
        data = {"preferences": dataset.content_hash, "relabelled": more.content_hash,
                "contrasts": Dataset("contrasts", tuple(readings)).content_hash,
                "held_out": held_out.content_hash, "base": weights_hash(base.step1_files)}  # fmt: skip
        trainer = RewardTrainer(trunk, self.tokenizer, pairs, c.reward, self.work.run("reward"),
                                data=data, observer=self.observer)  # fmt: skip
        trainer.train()
        trainer.save(base, self.work.checkpoint("reward"))
        report = trainer.evaluate(held_out.rows, self.tokenizer) if held_out.rows else {}
        return {"train_pairs": len(dataset.rows), "relabelled": len(more.rows), "contrasts": len(readings),
                "held_out": report, "best_of": self._best_of(trainer)}  # fmt: skip

    def ppo(self) -> dict[str, Any]:
        """PPO from the large-margin SFT model on the prompts that were hardest for it."""
        c, base = self.config, Checkpoint(self.work.checkpoint("sft_large_margin"))
        rows = self._asked("prompts")
        scores: dict[str, list[float]] = {}
        for line in self.work.read_lines("candidates_prompts.jsonl"):
            scores.setdefault(line["prompt"], []).append(line["judge_a"])
        hard = hardest(rows, [float(np.mean(scores[row.id])) for row in rows], c.hardest_share)
        watched = self._asked("held_out")
        system, ears = self._system(base.root), self._ears("judge_a")

        def listen(places: Sequence[int], answers: Sequence[Codes]) -> float:
            asked = [watched[k] for k in places]
            found = ears.listen(self.work, asked, answers, system, c.workers)
            return float(np.mean([ears.ratings(row, heard) for row, heard in zip(asked, found, strict=True)])) / 10

        trainer = PpoTrainer(
            self._model(base, torch.float32), as_critic(self._reward()), self._model(base, torch.float32),
            prompts_of(self.tokenizer, hard, c.ppo),
            LocalRollouts(self._model(base), self.vocabulary, slots=c.slots),
            LocalScorer(self._reward(), self.vocabulary), self.vocabulary, c.ppo, self.work.run("ppo"),
            watched=prompts_of(self.tokenizer, watched, c.ppo), judge=listen,
            data={"prompts": Dataset("hardest", tuple(hard)).content_hash,
                  "held_out": self.work.dataset("held_out_iterated").content_hash,
                  "base": weights_hash(base.step1_files),
                  "reward": weights_hash(self.work.checkpoint("reward").glob("*.safetensors"))},
            observer=self.observer,
        )  # fmt: skip
        trainer.train()
        sounds = sounds_in(self.work.dataset("large_margin").rows)
        self._write("ppo", trainer.state(), {"stage": "ppo", "prompts": len(hard)}, sounds)
        return {"prompts": len(hard), "checks": trainer.watch.checks}

    def evaluate(self) -> dict[str, Any]:
        """The benchmark for every system, by the judge that made no preference; the report with its table."""
        c = self.config
        cases = read_cases(self.root / "benchmark" / "cases.jsonl")
        judge = OfflineJudge(self._judge("judge_b"))
        for name in SYSTEMS:
            system = self._tested(name)
            for seed in range(c.seeds):
                progress = partial(self._told, f"{name}, seed {seed}")
                run(cases, system, judge, self._results(name, seed),
                    Setup(c.iterations, c.seed + 1000 * seed, c.workers), progress=progress)  # fmt: skip
        return self._report()

    def _tested(self, name: str) -> PortSystem:
        """One of SYSTEMS. The base with the reward model draws as the answers that the reward model learned from."""
        if name == "base":
            return self._system(self.base.root)
        checkpoint = self.work.checkpoint(name)
        if name != "best_of_8":
            return self._system(checkpoint)
        if not checkpoint.exists():
            write_with_reward(self.base, self.work.checkpoint("reward"), checkpoint)
        return replace(self._system(checkpoint), n_best=BEST_OF, temperature=self.config.temperature)

    def measure(self) -> dict[str, Any]:
        """Words, voice and naturalness of the benchmark's recordings; the report again."""
        cases = read_cases(self.root / "benchmark" / "cases.jsonl")
        for name in SYSTEMS if self.measures is not None else ():
            for seed in range(min(self.config.seeds, self.config.measured_seeds)):
                add_measures(cases, self._results(name, seed), self.measures or NoMeasures(),
                             progress=partial(self._told, f"{name}, seed {seed}"))  # fmt: skip
        return self._report()

    def _results(self, system: str, seed: int) -> Path:
        return self.root / "evaluation" / system / f"seed{seed}"

    def _told(self, what: str, fraction: float, note: str) -> None:
        if self.observer is not None:
            self.observer.progress(fraction, f"{what}: {note}")

    def _report(self) -> dict[str, Any]:
        runs: dict[str, Any] = {
            name: [read_results(self._results(name, seed)) for seed in range(self.config.seeds)] for name in SYSTEMS
        }
        results = {name: over_seeds(lines) for name, lines in runs.items()}
        report = write_report(results, self.root / "evaluation", steps=STEPS, seeds=runs)
        tables = {
            name: [{**row, "score": str(row["score"])} for row in summarise(lines)]
            for name, lines in results.items()
            if any("iterations" in line for line in lines)
        }
        write_outcome(self.work, self.config.candidates, report)
        failed = sum("error" in line for lines in runs.values() for one in lines for line in one)
        return {"report": str(report), "failed": failed, "systems": tables}

    def _material(self) -> Material:
        return load(self.root / "recordings")

    @cached_property
    def _code_distances(self) -> Table:
        return code_distances(load_linguistic(self.base).centroids.float().cpu().numpy())

    def _ears(self, *judges: str) -> Ears:
        path = self.root / WORDS
        words = SameWords.load(path, self._code_distances) if path.exists() else None
        return Ears([self._judge(name) for name in judges], words, self.config.weights)

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

    def _write(
        self, name: str, state: dict[str, torch.Tensor], facts: dict[str, object], sounds: Sequence[str]
    ) -> None:  # fmt: skip
        write_checkpoint(self.base, self.work.checkpoint(name), state, name=f"{self.base.metadata.name}-{name}",
                         version=self.base.metadata.version, facts=facts, sounds=sounds)  # fmt: skip

    def _scored(self, material: Material, scorer: MarginScorer, source: Item, target: Item) -> Row:
        edit = edit_towards(target.manner)
        margin = scorer.score(pair_features(at_16k(source.audio()), at_16k(target.audio())), str(edit))
        return material.row(source, target, edit, margin)

    def _draw(self, model: Step1, rows: Sequence[Row], seed: int) -> list[Codes]:
        c = self.config
        prompts = [np.asarray(self.tokenizer.encode_chat(row.turns()), np.int64) for row in rows]
        limits = [bounds_for(len(row.source.mixed), c.ppo.max_stretch, c.ppo.extra_groups) for row in rows]
        answers = draw(model, prompts, limits, self.vocabulary, temperature=c.temperature, seed=seed, slots=c.slots)
        return [answer.mixed for answer in answers]

    def _best_of(self, trainer: RewardTrainer) -> dict[str, float]:
        """Judge b's mean rating of the candidate that the reward model picks among 8, and of a candidate at random."""
        rows = {row.id: row for row in self._asked("held_out")}
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


def sounds_in(rows: Sequence[Row]) -> list[str]:
    """The paralinguistic tags that the rows teach."""
    edits = [row.edit for row in rows if row.edit.type == "paralinguistic"]
    return sorted({tag for edit in edits for tag in bracketed_tags(edit.target_text or "")})


STAGES: dict[str, Callable[[PostTrain], dict[str, Any]]] = {
    "record": PostTrain.record,
    "judges": PostTrain.judges,
    "data": PostTrain.data,
    "sft_unfiltered": lambda post: post.sft("unfiltered"),
    "sft_large_margin": lambda post: post.sft("large_margin"),
    "iterate": PostTrain.iterate,
    "preferences": PostTrain.preferences,
    "reward": PostTrain.reward,
    "ppo": PostTrain.ppo,
    "evaluate": PostTrain.evaluate,
    "measure": PostTrain.measure,
}
"""Name to stage, in order."""
