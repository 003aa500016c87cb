"""The published tags of Step-Audio-EditX (arXiv 2511.03601): what an edit may ask for, and what each means to people.

Knows the published vocabulary, not which part of it a checkpoint was trained on (editx.json says that).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType

from shared.errors import UserError

REMOVE = "remove"

EMOTIONS: Mapping[str, str] = MappingProxyType({
    "happy": "pleased and bright",
    "angry": "irritated, raised and hard",
    "sad": "low and sorrowful",
    "humour": "joking, with a smile in the voice",
    "confusion": "puzzled, unsure what is meant",
    "disgusted": "repelled by something",
    "empathy": "feeling with the listener",
    "embarrass": "awkward and ashamed",
    "fear": "frightened, tense",
    "surprised": "caught unawares",
    "excited": "eager and full of energy",
    "depressed": "without hope or drive",
    "coldness": "distant, without warmth",
    "admiration": "looking up to someone",
    REMOVE: "take the emotion out and speak plainly",
})  # fmt: skip

STYLES: Mapping[str, str] = MappingProxyType({
    "serious": "earnest and solemn",
    "arrogant": "looking down on the listener",
    "child": "like a child",
    "older": "like an old person",
    "girl": "like a girl, light and young",
    "pure": "innocent and clear",
    "sister": "like a grown, self-assured woman",
    "sweet": "charming and soft-hearted",
    "ethereal": "airy, as if from far away",
    "whisper": "whispered, without voice",
    "gentle": "soft and kind",
    "recite": "reciting a poem",
    "generous": "bold, open and passionate",
    "act_coy": "playful and coaxing",
    "warm": "friendly and close",
    "shy": "timid and reserved",
    "comfort": "soothing someone",
    "authority": "commanding, sure of being obeyed",
    "chat": "casual talk among friends",
    "radio": "a radio host",
    "soulful": "deeply felt",
    "story": "telling a story",
    "vivid": "lively, full of colour",
    "program": "presenting a show",
    "news": "reading the news",
    "advertising": "praising a product",
    "roar": "bellowing",
    "murmur": "muttering under the breath",
    "shout": "shouting",
    "deeply": "in a deep, grave voice",
    "loudly": "loud",
    "exaggerated": "overdone and theatrical",
    REMOVE: "take the speaking style out and speak plainly",
})  # fmt: skip

SPEEDS: Mapping[str, str] = MappingProxyType({
    "faster": "a little faster",
    "slower": "a little slower",
    "more faster": "much faster",
    "more slower": "much slower",
})  # fmt: skip

PARALINGUISTIC: Mapping[str, str] = MappingProxyType({
    "Breathing": "an audible breath",
    "Laughter": "laughter",
    "Surprise-oh": "a surprised oh",
    "Confirmation-en": "an affirming mm",
    "Uhm": "a hesitating uhm",
    "Surprise-ah": "a surprised ah",
    "Surprise-wa": "an amazed wa",
    "Sigh": "a sigh",
    "Question-ei": "a questioning ei",
    "Dissatisfaction-hnn": "a displeased hnn",
    # the release of January 2026 adds:
    "sigh": "a sigh",
    "inhale": "breathing in",
    "laugh": "a laugh",
    "chuckle": "a quiet laugh",
    "exhale": "breathing out",
    "clears throat": "clearing the throat",
    "snort": "a snort",
    "giggle": "a giggle",
    "cough": "a cough",
    "breath": "a breath",
    "uhm": "a hesitating uhm",
    "Surprise-yo": "a surprised yo",
    "Question-ah": "a questioning ah",
    "Question-en": "a questioning mm",
    "Question-yi": "a questioning yi",
    "Question-oh": "a questioning oh",
})  # fmt: skip
FIRST_RELEASE_PARALINGUISTIC = tuple(PARALINGUISTIC)[:10]

LANGUAGES: Mapping[str, str] = MappingProxyType({
    "Sichuanese": "Sichuan dialect",
    "Cantonese": "Cantonese",
    "Japanese": "Japanese",
    "Korean": "Korean",
})  # fmt: skip

TAGS: Mapping[str, Mapping[str, str]] = MappingProxyType({
    "emotion": EMOTIONS,
    "style": STYLES,
    "speed": SPEEDS,
    "paralinguistic": PARALINGUISTIC,
    "language": LANGUAGES,
})  # fmt: skip

_BRACKETED = re.compile(r"\[([^\[\]]+)\]")


def check_tag(kind: str, name: str) -> str:
    """The published spelling of a tag; case is forgiven where it is not what tells two tags apart.

    Raises UserError with the nearest known tags for an unknown one, and for an unknown kind.
    """
    if kind not in TAGS:
        raise UserError(f"There are no tags of kind {kind!r}.", f"Kinds with tags: {', '.join(TAGS)}.", "unknown_tag")
    known = TAGS[kind]
    if name in known:
        return name
    spelled = {tag.lower(): tag for tag in reversed(list(known))}
    folded = name.strip().lower()
    if folded in spelled:
        return spelled[folded]
    near = difflib.get_close_matches(folded, spelled, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(spelled[tag] for tag in near)}?" if near else f"Known: {', '.join(known)}."
    raise UserError(f"{name!r} is no known {kind} tag.", hint, "unknown_tag")


def bracketed_tags(text: str) -> list[str]:
    """The [tags] in a text, in order and without brackets."""
    return _BRACKETED.findall(text)


def check_text_tags(text: str) -> str:
    """A text with its [tags], sounds and languages, in published spelling. Raises UserError as check_tag does."""

    def spelled(match: re.Match[str]) -> str:
        name = match.group(1)
        kind = "language" if name.strip().title() in LANGUAGES else "paralinguistic"
        return f"[{check_tag(kind, name)}]"

    return _BRACKETED.sub(spelled, text)
