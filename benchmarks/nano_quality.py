"""How good the small checkpoint is, on voices and sentences it never saw. `python -m benchmarks.nano_quality`.

The source is the recipes' teacher with the four voices kept out of training saying sentences kept out of training,
and the bundled real recordings. Every row stands beside the source's own score (the ceiling) and Griffin-Lim from
the true mel (a mark). Judges: Whisper-base and pocketsphinx for words, Resemblyzer for the voice, DistillMOS for
naturalness, DNSMOS for the background. Prints Markdown; `--json FILE` writes every number.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch

from benchmarks.griffin_lim import mel_to_wave
from editx import Editor
from services.trainer.data.paralinguistic_sounds import TAGS, tagged_text, with_sound
from services.trainer.evaluate.judges import Judges, frame_levels, similarity, word_error_rate
from services.trainer.recipes.nano import assets, augment, corpus, sounds, teacher, texts
from shared.audio.features import prompt_mel
from shared.audio.io import Waveform, read_audio
from shared.audio.signal import normalize_peak
from shared.checkpoints.layout import Checkpoint
from shared.checkpoints.tokenizer import load_linguistic, load_semantic
from shared.errors import EditxError

ROOT = Path(__file__).parent.parent
RATE_HZ = teacher.SAMPLE_RATE_HZ
SEED = 7
DIRECTION_SHARE = 0.5
"""An edit counts when it moves every asked measure at least half as far as the teacher does."""
MARGINS = {"f0_hz": 0.04, "f0_range": 0.12, "level_db": 1.0, "duration_s": 0.06}
"""What of the teacher's own change counts as asked: relative, but for the level (dB)."""

REAL_DRAWS = 4
"""The real recordings have 35 English words between them: so many seeds each, or one sentence decides."""

SOUND_S = 0.15
"""A sound counts when so much more of a recording can be heard than without it."""


@dataclass(frozen=True)
class Clip:
    """A recording with its words. `voice` is a name of the teacher's, or "real"."""

    audio: np.ndarray
    text: str
    voice: str
    language: str = "en"

    @property
    def at_16k(self) -> np.ndarray:
        return to_16k(self.audio)

    @property
    def waveform(self) -> Waveform:
        return Waveform(self.audio, RATE_HZ)


def to_16k(audio: np.ndarray, rate_hz: int = RATE_HZ) -> np.ndarray:
    return np.asarray(soxr.resample(audio, rate_hz, 16_000), np.float32)


class Source:
    """The teacher with held-out voices and texts; renderings are kept in the data folder."""

    def __init__(self) -> None:
        found = assets.prepare()
        self._teacher = teacher.open_teacher(found, threads=2)
        self._phonemes = corpus.Phonemes()
        self._folder = assets.data_dir() / "benchmark"
        self._folder.mkdir(parents=True, exist_ok=True)
        kept = [s.text for s in texts.english(found.wordnet) if s.held_out and 7 <= len(s.text.split()) <= 14]
        self.texts = [kept[k] for k in np.random.default_rng(SEED).permutation(len(kept))]

    def say(self, text: str, voice: str, manner: str = "neutral") -> Clip:
        file = self._folder / f"{zlib.crc32(f'{text}|{voice}|{manner}'.encode()):08x}.flac"
        if not file.exists():
            spoken = self._teacher.say(self._phonemes(text, "en"), {voice: 1.0}, teacher.MANNERS[manner])
            soundfile.write(file, np.clip(spoken.audio, -1, 1), RATE_HZ, subtype="PCM_16")
        return Clip(soundfile.read(file, dtype="float32")[0], text, voice)

    def clips(self, number: int, first: int = 0) -> list[Clip]:
        """Sentences in turn over the unseen voices."""
        voices = corpus.HELD_OUT_VOICES
        return [self.say(self.texts[first + k], voices[k % len(voices)]) for k in range(number)]


def real_clips(folder: Path = ROOT / "tests" / "data" / "audio") -> list[Clip]:
    """The bundled recordings with their transcripts."""
    clips = []
    for file in sorted(folder.glob("*.wav")):
        text = file.with_suffix(".txt").read_text(encoding="utf-8").strip()
        sound = read_audio(file)
        audio = np.asarray(soxr.resample(sound.samples, sound.sample_rate_hz, RATE_HZ), np.float32)
        clips.append(Clip(audio, text, "real", "zh" if ord(text[0]) > 0x2E80 else "en"))
    return clips


Scores = dict[str, float]


def score(
    judges: Judges, outputs: Sequence[np.ndarray], clips: Sequence[Clip], references: Sequence[np.ndarray]
) -> Scores:
    """Means over a set: WER % (both recognisers), similarity to the references, DistillMOS. Outputs and
    references at 16 kHz."""
    languages = {clip.language for clip in clips}
    result: Scores = {}
    for language in sorted(languages):
        chosen = [k for k, clip in enumerate(clips) if clip.language == language]
        said = [clips[k].text for k in chosen]
        name = "WER %" if language == "en" else "CER % (zh)"
        result[name] = word_error_rate(said, [judges.hear(outputs[k], language) for k in chosen], language)
        if language == "en":
            result["2nd WER %"] = word_error_rate(said, [judges.hear_again(outputs[k]) for k in chosen])
    result["similarity"] = float(
        np.mean([similarity(judges.voice(o), judges.voice(r)) for o, r in zip(outputs, references, strict=True)])
    )
    result["DistillMOS"] = float(np.mean([judges.naturalness(o) for o in outputs]))
    return result


def resynthesis(editor: Editor, judges: Judges, clips: Sequence[Clip], draws: int = 1) -> dict[str, Scores]:
    """Tokenise and decode again, `draws` times with a seed each, beside the source and Griffin-Lim."""
    originals = [clip.at_16k for clip in clips]
    decoded, marks = [], []
    for clip in clips:
        tokens = editor.tokenize(clip.waveform)
        decoded += [to_16k(editor.decode(tokens, seed=SEED + draw).samples) for draw in range(draws)]
        marks.append(to_16k(mel_to_wave(prompt_mel(torch.from_numpy(clip.audio)).numpy())))
    of_each, voices = ([one for one in of for _ in range(draws)] for of in (clips, originals))
    return {
        "source": score(judges, originals, clips, originals),
        "Griffin-Lim, true mel": score(judges, marks, clips, originals),
        "editx": score(judges, decoded, of_each, voices),
    }


def attempt(run: Callable[[], Any]) -> np.ndarray:
    """16 kHz audio of a result; a failed job counts as a second of silence."""
    try:
        audio: Waveform = run().audio
    except EditxError as problem:
        print(f"  failed: {problem}", file=sys.stderr)
        return np.zeros(16_000, np.float32)
    return to_16k(audio.samples, audio.sample_rate_hz)


def cloning(editor: Editor, judges: Judges, source: Source, number: int) -> dict[str, Scores]:
    """Say held-out sentences in unseen voices from another held-out sentence of that voice."""
    targets, references = (
        source.clips(number),
        [source.say(source.texts[number + k], corpus.HELD_OUT_VOICES[k % 4]) for k in range(number)],
    )
    outputs = []
    for target, reference in zip(targets, references, strict=True):
        made = attempt(lambda t=target, r=reference: editor.clone(r.waveform, t.text, reference_text=r.text, seed=SEED))  # type: ignore[misc]
        outputs.append(made)
    voices = [reference.at_16k for reference in references]
    return {
        "teacher": score(judges, [t.at_16k for t in targets], targets, voices),
        "editx": score(judges, outputs, targets, voices),
    }


def edits(editor: Editor, judges: Judges, source: Source, number: int) -> tuple[dict[str, Scores], dict[str, str]]:
    """Every trained emotion, style and speed on `number` clips each: direction kept, words and voice kept.

    Beside it the teacher's own readings through the codes and the decoder, in the source's voice: what an edit could
    reach if the language model made no mistake.
    """
    rows: dict[str, str] = {}
    made: dict[str, list[tuple[Clip, np.ndarray, bool]]] = {"teacher's, through the codes": [], "editx": []}
    for manner in [name for name in teacher.MANNERS if name != "neutral"]:
        kind, _, detail = manner.partition("/")
        for clip in source.clips(number, first=200):
            wanted = source.say(clip.text, clip.voice, manner)
            edited = attempt(lambda c=clip, k=kind, d=detail: editor.edit(c.waveform, text=c.text, seed=SEED, **{k: d}))  # type: ignore[misc]
            decoded = editor.decode(editor.tokenize(wanted.waveform), editor.tokenize(clip.waveform), seed=SEED)
            for name, audio in zip(made, (to_16k(decoded.samples), edited), strict=True):
                made[name].append((clip, audio, follows(judges, clip.at_16k, wanted.at_16k, audio)))
        hits = [right for _, _, right in made["editx"][-number:]]
        rows[manner] = f"{sum(hits)}/{len(hits)}"
    return {name: _edit_scores(judges, results) for name, results in made.items()}, rows


def _edit_scores(judges: Judges, results: Sequence[tuple[Clip, np.ndarray, bool]]) -> Scores:
    voices = [similarity(judges.voice(audio), judges.voice(clip.at_16k)) for clip, audio, _ in results]
    return {
        "direction %": 100 * float(np.mean([right for _, _, right in results])),
        "WER %": word_error_rate([clip.text for clip, _, _ in results], [judges.hear(a) for _, a, _ in results]),
        "similarity": float(np.mean(voices)),
    }


def follows(judges: Judges, before: np.ndarray, wanted: np.ndarray, after: np.ndarray) -> bool:
    """Whether every measure that the teacher moved by more than its margin moved the same way by at least half as
    much."""
    a, b, c = (judges.prosody(x) for x in (before, wanted, after))
    if b.voiced_share < 0.25 * a.voiced_share:
        return (
            c.voiced_share < 0.625 * a.voiced_share
        )  # a whisper: at least half of the voicing went that the teacher took
    for name, margin in MARGINS.items():
        start, goal, end = (getattr(x, name) for x in (a, b, c))
        asked, moved = (
            (goal - start, end - start)
            if name == "level_db"
            else (np.log(max(goal, 1e-3) / max(start, 1e-3)), np.log(max(end, 1e-3) / max(start, 1e-3)))
        )
        if abs(asked) > margin and moved / asked < DIRECTION_SHARE:
            return False
    return True


def cleaning(editor: Editor, judges: Judges, source: Source, number: int) -> dict[str, Scores]:
    """Denoise at 5 dB, and cut pauses of 0.6 s that were put between sentences."""
    clips = source.clips(number, first=300)
    rng = np.random.default_rng(SEED)
    noisy = [augment.add_noise(c.audio, augment.colored_noise(len(c.audio), 1.0, rng), 5.0) for c in clips]
    cleaned = [attempt(lambda n=n: editor.edit(Waveform(n, RATE_HZ), denoise=True, seed=SEED)) for n in noisy]  # type: ignore[misc]
    silence = np.zeros(int(0.6 * RATE_HZ), np.float32)
    paused = [np.concatenate([c.audio, silence, d.audio]) for c, d in zip(clips[::2], clips[1::2], strict=True)]
    cut = [attempt(lambda p=p: editor.edit(Waveform(p, RATE_HZ), vad=True, seed=SEED)) for p in paused]  # type: ignore[misc]
    said, joined = [c.text for c in clips], [f"{c.text} {d.text}" for c, d in zip(clips[::2], clips[1::2], strict=True)]
    return {
        "denoise": {
            "background before": float(np.mean([judges.background(to_16k(n)) for n in noisy])),
            "background after": float(np.mean([judges.background(c) for c in cleaned])),
            "WER before %": word_error_rate(said, [judges.hear(to_16k(n)) for n in noisy]),
            "WER after %": word_error_rate(said, [judges.hear(c) for c in cleaned]),
        },
        "vad": {
            "pauses gone %": 100 * float(np.mean([longest_pause_s(c) <= 0.3 for c in cut])),
            "WER before %": word_error_rate(joined, [judges.hear(to_16k(p)) for p in paused]),
            "WER after %": word_error_rate(joined, [judges.hear(c) for c in cut]),
        },
    }


def in_noise(editor: Editor, judges: Judges, checkpoint: Checkpoint, clips: Sequence[Clip]) -> dict[str, Scores]:
    """Tokenise and decode in pink noise, without the language model: share of the codes that are those of the clean
    recording, words, naturalness."""
    tokenizers = load_linguistic(checkpoint), load_semantic(checkpoint)
    rng = np.random.default_rng(SEED)
    noises = [augment.colored_noise(len(clip.audio), 1.0, rng) for clip in clips]
    result: dict[str, Scores] = {}
    for name, snr_db in {"clean": None, **{f"{snr} dB": float(snr) for snr in (15, 10, 5)}}.items():
        heard = [
            c.audio if snr_db is None else augment.add_noise(c.audio, n, snr_db)
            for c, n in zip(clips, noises, strict=True)
        ]
        decoded = [to_16k(editor.decode(editor.tokenize(Waveform(h, RATE_HZ)), seed=SEED).samples) for h in heard]
        equal = {
            f"{kind} equal %": 100 * float(np.mean(np.concatenate([
                tokenizer.encode([full_scale(h)])[0] == tokenizer.encode([full_scale(c.audio)])[0]
                for h, c in zip(heard, clips, strict=True)
            ])))
            for kind, tokenizer in zip(("linguistic", "semantic"), tokenizers, strict=True)
        }  # fmt: skip
        result[name] = equal | {
            "WER before %": word_error_rate([c.text for c in clips], [judges.hear(to_16k(h)) for h in heard]),
            "WER after %": word_error_rate([c.text for c in clips], [judges.hear(d) for d in decoded]),
            "DistillMOS": float(np.mean([judges.naturalness(d) for d in decoded])),
        }
    return result


def full_scale(audio: np.ndarray) -> torch.Tensor:
    """24 kHz (n,) to 16 kHz as the front end gives it to the tokenizers, untrimmed."""
    return normalize_peak(torch.from_numpy(to_16k(audio)))


def paralinguistic(editor: Editor, judges: Judges, source: Source, number: int) -> dict[str, Scores]:
    """Put each sound into the middle of `number` clips: whether it is there, words and voice kept.

    A sound is there when so much more can be heard than without it: in the teacher's own through the codes than in the
    source through them, in an edit than in the same edit without a tag.
    """
    voices = sounds.Voices()
    without, teachers = "without: the source, through the codes", "with: the teacher's, through the codes"
    untagged, edited = "without: editx, no tag", "with: editx"
    made: dict[str, list[np.ndarray]] = {name: [] for name in (without, teachers, untagged, edited)}
    clips = source.clips(number, first=400)
    for clip in clips:
        tokens, words = editor.tokenize(clip.waveform), clip.text.split()
        say, middle = voices.of({"voice_name": clip.voice, "voice": {clip.voice: 1.0}}), len(words) // 2

        def say_again(text: str, clip: Clip = clip) -> np.ndarray:
            return attempt(lambda: editor.edit(clip.waveform, text=clip.text, paralinguistic=text, seed=SEED))

        made[without] += [to_16k(editor.decode(tokens, tokens, seed=SEED).samples)] * len(TAGS)
        made[untagged] += [say_again(clip.text)] * len(TAGS)
        for tag in TAGS:
            spoken = editor.tokenize(with_sound(words, tag, middle, "en", say, np.random.default_rng(SEED)))
            made[teachers].append(to_16k(editor.decode(spoken, tokens, seed=SEED).samples))
            made[edited].append(say_again(tagged_text(words, tag, middle, "en")))
    said = [clip for clip in clips for _ in TAGS]
    results = {name: score(judges, outputs, said, [c.at_16k for c in said]) for name, outputs in made.items()}
    for name, base in ((teachers, without), (edited, untagged)):
        more = np.array([audible_s(a) - audible_s(b) for a, b in zip(made[name], made[base], strict=True)])
        there = 100 * (more.reshape(-1, len(TAGS)) >= SOUND_S).mean(0)
        results[name] = {f"{tag} there %": float(share) for tag, share in zip(TAGS, there, strict=True)} | results[name]
    return results


def audible_s(audio_16k: np.ndarray) -> float:
    """Seconds of 20 ms frames within 40 dB of the loudest."""
    level = frame_levels(audio_16k)
    return float((level > level.max() - 40.0).sum()) * 0.02 if len(level) else 0.0


def longest_pause_s(audio_16k: np.ndarray, floor_db: float = -35.0) -> float:
    """The longest run of 20 ms frames that lie `floor_db` below the loudest, between the first and the last loud
    one."""
    level = frame_levels(audio_16k)
    loud = np.flatnonzero(level > level.max() + floor_db)
    return float(np.diff(loud).max() - 1) * 0.02 if len(loud) > 1 else 9.9


COLD = """
import sys, time
began = time.perf_counter()
from editx import Editor
from pathlib import Path
editor = Editor(sys.argv[1])
result = editor.edit(Path(sys.argv[2]), emotion="happy", seed=7)
print(time.perf_counter() - began - result.seconds, result.seconds)
again = editor.edit(Path(sys.argv[2]), emotion="happy", seed=7)
import resource
print(again.rtf, again.audio.duration_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
from benchmarks.first_audio import measure
speech = measure(editor.system, calls=5)
print(*(speech[voice]["first audio s"] for voice in ("a new voice", "a known voice")))
editor.close()
"""


def footprint(checkpoint: str, root: Path) -> dict[str, Scores]:
    """Size on disk, and a fresh process's start, second edit, memory, and first audio of speech (`first_audio`)."""
    clip = ROOT / "tests" / "data" / "audio" / "en_happy_prompt.wav"
    done = subprocess.run(
        [sys.executable, "-c", COLD, checkpoint, str(clip)],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
        env=os.environ,
        cwd=ROOT,
    )
    start, second, third = done.stdout.strip().splitlines()[-3:]
    first, (rtf, seconds, resident) = start.split(), (float(x) for x in second.split())
    new_voice, known_voice = (float(x) for x in third.split())
    size = sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) / 1e6
    return {
        "editx": {
            "on disk MB": size, "imports s": float(first[0]), "first edit s": float(first[1]),
            "of it for the start s": float(first[1]) - rtf * seconds, "RTF of a second edit": rtf,
            "its audio s": seconds, "resident GB": resident, "first audio, new voice s": new_voice,
            "known voice s": known_voice,
        }
    }  # fmt: skip


def table(title: str, rows: dict[str, Scores]) -> str:
    """A Markdown table with one column for every score that any row has."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"\n### {title}\n", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{row[c]:.2f}" if c in row else "-" for c in columns) + " |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="nano")
    parser.add_argument("--parts", default="footprint,resynthesis,real,clone,edits,cleaning,noise,sounds")
    parser.add_argument("--clips", type=int, default=50, help="of resynthesis and clone; the other parts take a tenth")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    parts, number, results = arguments.parts.split(","), arguments.clips, {}
    judges, source = Judges(assets.prepare().whisper), Source()
    few = max(2, number // 10 * 2 // 2)
    with Editor(arguments.checkpoint) as editor, tempfile.TemporaryDirectory():
        began = time.perf_counter()
        if "footprint" in parts:
            results["Footprint"] = footprint(arguments.checkpoint, editor.checkpoint.root)
            print(table("Footprint", results["Footprint"]), flush=True)
        if "resynthesis" in parts:
            results["Tokenise and decode"] = resynthesis(editor, judges, source.clips(number))
            print(table("Tokenise and decode again", results["Tokenise and decode"]), flush=True)
        if "real" in parts:
            results["Real recordings"] = resynthesis(editor, judges, real_clips(), draws=REAL_DRAWS)
            print(table("The same on real recordings", results["Real recordings"]), flush=True)
        if "clone" in parts:
            results["Clone"] = cloning(editor, judges, source, number)
            print(table("Clone", results["Clone"]), flush=True)
        if "edits" in parts:
            results["Edits"], by_manner = edits(editor, judges, source, few)
            print(
                table("Edits", results["Edits"]),
                "\n\nright by manner: " + ", ".join(f"{k} {v}" for k, v in by_manner.items()),
                flush=True,
            )
        if "cleaning" in parts:
            results["Cleaning"] = cleaning(editor, judges, source, few + few % 2)
            print(table("Denoise and vad", results["Cleaning"]), flush=True)
        if "noise" in parts:
            results["Noise"] = in_noise(editor, judges, editor.checkpoint, source.clips(few, first=500))
            print(table("Tokenise and decode in noise", results["Noise"]), flush=True)
        if "sounds" in parts:
            results["Paralinguistic"] = paralinguistic(editor, judges, source, few)
            print(table("Paralinguistic", results["Paralinguistic"]), flush=True)
        print(
            f"\n{time.perf_counter() - began:.0f} s on {os.cpu_count()} cores, "
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB at most"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
