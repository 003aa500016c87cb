"""How the next audio token is chosen, what a sequence may look like, how long it may get, and when it has collapsed.

A sampler belongs to one sequence. Its randomness is counter-based: the draw of step t depends on seed, attempt and t
alone, so a sequence comes out the same whatever runs beside it. Knows nothing about models; logits come in as numpy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.codes import AUDIO_VOCAB, GROUP, GROUP_S, LINGUISTIC_PER_GROUP, LINGUISTIC_SIZE, Codes
from shared.errors import PermanentError, UserError
from shared.schemas.edit import Edit
from shared.tags import bracketed_tags

END = AUDIO_VOCAB
CHOICES = AUDIO_VOCAB + 1
SEED_MAX = 2**63 - 1
LIKELY = 7.0
"""Nats below the likeliest token that a guided draw may still take."""

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SamplingSettings:
    """How one sequence is sampled. Lengths in groups of five tokens (120 ms).

    The repetition rule forbids the newest token when it makes up more than `repetition_ratio` of the last
    `repetition_window` tokens (10 and 0.1 in the official release's first form, off in its present one); window 0
    switches it off.
    `attempts`: how often a collapsed sequence is drawn anew. `guidance`: how far the draw goes away from another prompt
    where one is given (arXiv 2306.17806); 0 leaves it out of account. `ends_full`: reaching `max_groups` is an end like
    another, not a collapse.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    repetition_window: int = 0
    repetition_ratio: float = 0.1
    seed: int = 0
    min_groups: int = 1
    max_groups: int = 1500
    attempts: int = 3
    guidance: float = 0.0
    ends_full: bool = False

    def __post_init__(self) -> None:
        rules = {
            "temperature must lie in 0..2": 0.0 <= self.temperature <= 2.0,
            "top_p must lie in (0, 1]": 0.0 < self.top_p <= 1.0,
            "top_k must not be negative": self.top_k >= 0,
            "repetition_window must not be negative": self.repetition_window >= 0,
            "repetition_ratio must lie in 0..1": 0.0 <= self.repetition_ratio <= 1.0,
            f"seed must lie in 0..{SEED_MAX}": 0 <= self.seed <= SEED_MAX,
            "min_groups must be at least 1 and at most max_groups": 1 <= self.min_groups <= self.max_groups,
            "attempts must lie in 1..10": 1 <= self.attempts <= 10,
            "guidance must lie in 0..10": 0.0 <= self.guidance <= 10.0,
        }
        for rule, holds in rules.items():
            if not holds:
                raise UserError(f"Sampling: {rule}.", "Leave it out for the default.", "invalid_sampling")


class Sampler:
    """The state of one sequence: its tokens so far (mixed ids) and its place in the grammar.

    Logits are given over CHOICES entries: the mixed ids 0..5119 and END. A group is two linguistic and three semantic
    tokens; END may come only between groups, from `min_groups` on, and must come at `max_groups`.
    """

    def __init__(self, settings: SamplingSettings, attempt: int = 0) -> None:
        self.settings = settings
        self.attempt = attempt
        self.tokens: list[int] = []

    @property
    def groups(self) -> int:
        return len(self.tokens) // GROUP

    @property
    def at_limit(self) -> bool:
        """Whether only END may follow."""
        return len(self.tokens) >= self.settings.max_groups * GROUP

    def allowed(self) -> tuple[int, int, bool]:
        """The mixed ids [low, high) that may come next, and whether END may."""
        if self.at_limit:
            return 0, 0, True
        place = len(self.tokens) % GROUP
        end = place == 0 and self.groups >= self.settings.min_groups
        if place < LINGUISTIC_PER_GROUP:
            return 0, LINGUISTIC_SIZE, end
        return LINGUISTIC_SIZE, AUDIO_VOCAB, end

    def _repeated(self) -> int | None:
        """The token that the repetition rule forbids now."""
        window = self.settings.repetition_window
        if not window or not self.tokens:
            return None
        last = self.tokens[-1]
        share = self.tokens[-window:].count(last) / window
        return last if share > self.settings.repetition_ratio else None

    def choose(self, logits: Logits, against: Logits | None = None) -> int:
        """Draw the next token from logits (CHOICES,) and remember it; END is returned and not remembered.

        `against`: logits of the same place after another prompt, which the draw is guided away from. Raises
        PermanentError when the logits hold no finite number to choose from.
        """
        low, high, end = self.allowed()
        if low == high:
            return END
        scores = _among(logits, low, high, end)
        if against is not None:
            scores = self._guided(scores, _among(against, low, high, end))
        repeated = self._repeated()
        if repeated is not None and low <= repeated < high:
            scores[repeated - low] = -np.inf
        if np.isnan(scores).any() or not np.isfinite(scores.max()):
            raise PermanentError(
                f"The language model gave no usable number at token {len(self.tokens)}.",
                "The checkpoint is damaged or its dtype overflows: verify it, or load it in float32.", "bad_logits",
            )  # fmt: skip
        pick = self._draw(scores)
        if end and pick == len(scores) - 1:
            return END
        self.tokens.append(low + pick)
        return low + pick

    def _guided(self, scores: npt.NDArray[np.float64], against: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Scores that grow by how much likelier a token is than after the other prompt, among those that are likely."""
        guided = scores + self.settings.guidance * (scores - against)
        return np.where(scores >= scores.max() - LIKELY, guided, -np.inf)

    def _draw(self, scores: npt.NDArray[np.float64]) -> int:
        s = self.settings
        if s.temperature == 0.0:
            return int(scores.argmax())
        weights = np.exp((scores - scores.max()) / s.temperature)
        if s.top_k and s.top_k < len(weights):
            weights[np.argsort(-scores, kind="stable")[s.top_k :]] = 0.0
        if s.top_p < 1.0:
            order = np.argsort(-weights, kind="stable")
            reached = np.cumsum(weights[order]) / weights.sum()
            weights[order[int(np.searchsorted(reached, s.top_p)) + 1 :]] = 0.0
        edges = np.cumsum(weights)
        return int(np.searchsorted(edges, self._uniform() * edges[-1], side="right"))

    def _uniform(self) -> float:
        """The step's number in [0, 1)."""
        key = self.settings.seed | self.attempt << 64
        return float(np.random.Generator(np.random.Philox(key=key, counter=len(self.tokens))).random())


def _among(logits: Logits, low: int, high: int, end: bool) -> npt.NDArray[np.float64]:
    """Logits of the mixed ids [low, high), and of END behind them where it may come."""
    scores = logits[low:high].astype(np.float64)
    return np.append(scores, float(logits[END])) if end else scores


# How much shorter or longer than its source an edit may be, as factors, and groups on top of the upper bound.
_BOUNDS = {
    "emotion": (0.4, 2.0, 12),
    "style": (0.4, 2.5, 12),
    "denoise": (0.7, 1.3, 8),
    "vad": (0.1, 1.0, 0),
    "paralinguistic": (0.6, 1.6, 12),
    "speed faster": (0.4, 1.2, 4),
    "speed slower": (0.8, 2.5, 8),
    "speed more faster": (0.25, 1.1, 4),
    "speed more slower": (0.8, 3.5, 8),
    "clone": (0.3, 3.0, 17),
}
GROUPS_PER_SOUND = 17
MEL_FRAMES_PER_GROUP = 6
PAUSE_FRAMES = 12
"""0.24 s: what is left of it in whole groups and what the decoder adds stays below 0.3 s."""
TAIL_FRAMES = 2
HEARD_RANGE = 4.6
"""Of a log mel: 40 dB."""
GROUPS_PER_UNIT = 0.2 / GROUP_S
FASTEST_UNIT_S, FASTEST_SHARE = 0.18, 0.85
"""A text said in less than so many seconds per unit, and in less than so much of what another reading took, was not
said to its end. Of the recipes' readings 0.5 % are faster, those that are asked to be (_HASTE) aside."""
_HASTE = {"speed faster": 0.75, "speed more faster": 0.6}
_WIDE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\d")
_LETTER = re.compile(r"[^\W\d_]")


def speech_units(text: str) -> float:
    """About how many syllables a text has: one per CJK sign or digit, one per three other letters; [tags] left out."""
    spoken = re.sub(r"\[[^\[\]]*\]", "", text)
    wide = len(_WIDE.findall(spoken))
    letters = len(_LETTER.findall(_WIDE.sub("", spoken)))
    return max(1.0, wide + letters / 3)


def audible_share(mel: npt.NDArray[np.float32]) -> float:
    """Share of a recording's frames, (frames, bins) of log mel, that can be heard beside its loud ones: less than the
    share of its speech, whatever the level of its noise."""
    return float(_heard(mel).mean()) if len(mel) else 0.0


def _heard(mel: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Frames above a third of the way from the recording's quiet to its loud ones, and within HEARD_RANGE of these."""
    levels = mel.max(1)
    quiet, loud = np.percentile(levels, [5, 95])
    found: npt.NDArray[np.bool_] = levels > max(quiet + (loud - quiet) / 3, loud - HEARD_RANGE)
    return found


def outside_pauses(mel: npt.NDArray[np.float32], groups: int) -> npt.NDArray[np.bool_]:
    """Which of a recording's groups are not inside a pause, where nothing can be heard for PAUSE_FRAMES or more,
    (groups,); all of them where nothing stands out. A sound's last TAIL_FRAMES may go with the pause behind it. `mel`
    (frames, bins) must last as long as the groups do.
    """
    kept = np.ones(groups, bool)
    heard = _heard(mel) if len(mel) else np.zeros(0, bool)
    if not heard.any():
        return kept
    for start, stop in np.flatnonzero(np.diff(np.concatenate([[0], ~heard, [0]]))).reshape(-1, 2):
        if stop - start >= PAUSE_FRAMES:
            kept[-((TAIL_FRAMES - start) // MEL_FRAMES_PER_GROUP) : stop // MEL_FRAMES_PER_GROUP] = False
    return kept


def length_bounds(
    edit: Edit, source_groups: int, source_text: str | None = None, *, audible: float = 0.0,
    max_duration_s: float | None = None,
) -> tuple[int, int]:  # fmt: skip
    """The fewest and most groups that the result of an edit may have, from the source's length and the kind of edit.

    A clone's length is guessed from the two texts and the speed of the reference. Sounds asked for in [tags] add room.
    Where both recording and text are known, no result is shorter than the text said in haste.
    Vad keeps at least what can be heard (`audible_share`), so that it does not end in a pause with speech behind it.
    `max_duration_s` caps both. Bounds are wide: they stop a runaway, they do not shape the result.
    """
    key = f"{edit.type} {edit.detail}" if edit.type == "speed" else edit.type
    shorter, longer, extra = _BOUNDS[key]
    expected = float(max(1, source_groups))
    is_told = bool(source_text and source_text.strip())
    pace = expected / speech_units(source_text or "") if is_told else GROUPS_PER_UNIT
    pace = min(max(pace, GROUPS_PER_UNIT / 3), GROUPS_PER_UNIT * 3)
    units = speech_units(edit.target_text or source_text or "")
    if edit.type == "clone":
        expected = units * pace
    if is_told:
        hasty = _HASTE.get(key, 1.0) * min(FASTEST_UNIT_S / GROUP_S, FASTEST_SHARE * pace)
        shorter = max(shorter, units * hasty / expected)
    if edit.type == "vad":
        shorter = max(shorter, audible)
    extra += GROUPS_PER_SOUND * len(bracketed_tags(edit.target_text or ""))
    fewest, most = max(1, int(expected * shorter)), int(expected * longer) + extra
    if max_duration_s is not None:
        most = max(1, min(most, int(max_duration_s / GROUP_S)))
    return min(fewest, most), most


LOOP_S = 5.0
LOOP_CYCLES = 4
LONGEST_PERIOD = 25
LOOP_AGREEMENT = 0.95


def find_loop(mixed: npt.ArrayLike) -> int | None:
    """Where the end of a sequence starts to repeat itself, as a group index, or None.

    A loop is a period of at most 25 groups (3 s) whose semantic tokens agree to 95 % over the last 5 s or four cycles,
    whichever is longer. A single held code (period 1) counts too: five seconds of it is no pause between words.
    """
    tokens: Codes = np.asarray(mixed, dtype=np.int32)
    groups = tokens[: len(tokens) // GROUP * GROUP].reshape(-1, GROUP)[:, LINGUISTIC_PER_GROUP:]
    shortest = int(np.ceil(LOOP_S / GROUP_S))
    for period in range(1, LONGEST_PERIOD + 1):
        span = max(shortest, LOOP_CYCLES * period)
        if len(groups) < span + period:
            return None
        same = groups[-span:] == groups[-span - period : -period]
        if same.mean() >= LOOP_AGREEMENT:
            return len(groups) - span
    return None
