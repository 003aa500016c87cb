"""Whether a text is written in a language that a checkpoint knows: by its script, which is all that can be told for
sure.

Knows nothing about what the words mean, or whether a recording says them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection

from shared.errors import UserError

SCRIPTS: dict[str, tuple[str, frozenset[str]]] = {
    "CJK": ("Chinese characters", frozenset({"zh", "zh-sichuan", "yue", "ja"})),
    "HIRAGANA": ("Japanese", frozenset({"ja"})),
    "KATAKANA": ("Japanese", frozenset({"ja"})),
    "HANGUL": ("Korean", frozenset({"ko"})),
    "CYRILLIC": ("Cyrillic", frozenset({"ru", "uk", "bg", "sr"})),
    "ARABIC": ("Arabic", frozenset({"ar", "fa", "ur"})),
    "DEVANAGARI": ("Devanagari", frozenset({"hi", "mr", "ne"})),
    "THAI": ("Thai", frozenset({"th"})),
    "GREEK": ("Greek", frozenset({"el"})),
    "HEBREW": ("Hebrew", frozenset({"he"})),
    "LATIN": ("Latin letters", frozenset({"en", "de", "fr", "es", "it", "pt", "nl", "pl", "tr", "vi", "id"})),
}
"""First word of a letter's Unicode name to what people call the script, and languages that are written in it."""

OF_TAGS = {"Sichuanese": "zh-sichuan", "Cantonese": "yue", "Japanese": "ja", "Korean": "ko"}
"""The published language tags to what a checkpoint's list of languages calls them."""

SHARE = 0.5
_LISTED = frozenset[str]().union(*(languages for _, languages in SCRIPTS.values()))
_TAG = re.compile(r"\[[^\]]*\]")


def check_language(text: str, languages: Collection[str], checkpoint: str) -> None:
    """Raise UserError if most letters of `text` are of a script in which none of the checkpoint's languages is
    written.

    `languages` are codes such as "en" and "zh". Where none are given, or one that is not listed here, everything is
    allowed; [tags] in the text do not count.
    """
    spoken = _TAG.sub("", text)
    letters = [character for character in spoken if character.isalpha()]
    if not letters or not languages or set(languages) - _LISTED:
        return
    script, count = Counter(unicodedata.name(letter, "UNKNOWN").split()[0] for letter in letters).most_common(1)[0]
    known = SCRIPTS.get(script)
    if count / len(letters) < SHARE or known is None or known[1] & set(languages):
        return
    raise UserError(
        f"The text is written in {known[0]}, and the checkpoint {checkpoint} speaks {', '.join(sorted(languages))}.",
        "Use a text in one of these languages, or another checkpoint.",
        "wrong_language",
    )
