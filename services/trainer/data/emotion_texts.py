"""Which texts fit an emotion, by plain words of English and Mandarin.

The paper has a language model write texts for every emotion; these pick such texts out of many that are there. A text
with a word of an emotion is not always meant so ("He drives me mad" is, "a mad scientist" is not), but it never belongs
to another emotion more. Emotions that have no words here take any text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_ENGLISH = {
    "happy": "happy happily glad joy joyful delight delighted delightful pleased pleasure smile smiled smiling laugh "
    "laughed cheerful cheer merry wonderful fun enjoy enjoyed enjoys celebrate celebrated proud success",
    "angry": "angry angrily anger mad furious rage raged outrage outraged outrageous hate hated hates insulted "
    "disgusting stupid liar cheat cheated fool shouted quarrel argued protest blame blamed betrayed annoyed annoying "
    "irritated resent resented",
    "sad": "sad sadly sadness sorrow grief wept weep cried crying tears mourn mourned lonely died dead death funeral "
    "miserable unhappy regret regretted sorry tragedy tragic grave buried farewell",
    "fear": "afraid fear feared fears frightened frightening terror terrified scared danger dangerous threat "
    "threatened threatening panic horror horrible nightmare ghost trembled trembling shudder monster attacked",
    "surprised": "surprise surprised surprising suddenly sudden unexpected unexpectedly amazed amazing astonished "
    "astonishing shock shocked incredible unbelievable stunned startled miracle",
    "excited": "excited exciting excitement thrill thrilled thrilling eager eagerly winner victory champion adventure "
    "party enthusiastic enthusiasm passion passionate fantastic triumph applause",
    "depressed": "depressed depressing depression tired weary exhausted hopeless despair gloomy gloom failure failed "
    "useless worthless disappointed disappointing disappointment weak empty dull bored pain suffering suffered burden",
    "coldness": "cold indifferent indifference refuse refused refuses ignore ignored rejected denied dismissed strict "
    "stern formal silent silence distant",
}  # fmt: skip
_MANDARIN = {
    "happy": "高兴 快乐 开心 幸福 笑 祝", "angry": "生气 吵 讨厌 骂 怪", "sad": "难过 伤心 哭 可怜 对不起 去世",
    "fear": "害怕 怕 危险 担心", "surprised": "没想到 突然 居然 竟然 奇怪 吃惊", "excited": "激动 兴奋 赢 比赛 太好",
    "depressed": "累 失望 压力 失败 难受 孤单 痛苦", "coldness": "没关系 无所谓 不想 不行 拒绝",
}  # fmt: skip
_WORDS = {emotion: frozenset(words.split()) for emotion, words in _ENGLISH.items()}
_PARTS = {emotion: tuple(words.split()) for emotion, words in _MANDARIN.items()}


def fits(text: str, emotion: str) -> bool:
    """Whether a word of the emotion stands in the text."""
    words = re.findall(r"[a-z]+", text.lower())
    return not _WORDS.get(emotion, frozenset()).isdisjoint(words) or any(p in text for p in _PARTS.get(emotion, ()))


def fitting(texts: Sequence[str], emotion: str) -> list[str]:
    """The texts that fit an emotion; all of them where none does."""
    return [text for text in texts if fits(text, emotion)] or list(texts)
