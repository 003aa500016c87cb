"""Texts in a script that a checkpoint cannot speak are refused, and no others."""

from __future__ import annotations

import pytest

from shared.errors import UserError
from shared.languages import check_language


@pytest.mark.parametrize(
    ("text", "languages"),
    [
        ("今天天气很好。", ["en"]),
        ("こんにちは、元気ですか", ["en", "zh"]),
        ("안녕하세요", ["zh"]),
        ("Привет, как дела?", ["en", "zh"]),
        ("Hello there.", ["zh"]),
    ],
)
def test_a_text_in_an_unknown_script_is_refused_with_the_known_languages(text: str, languages: list[str]) -> None:
    with pytest.raises(UserError, match=", ".join(sorted(languages))):
        check_language(text, languages, "nano")


@pytest.mark.parametrize(
    ("text", "languages"),
    [
        ("Hello there.", ["en"]),
        ("今天我们用 Python 写代码，非常有意思。", ["zh"]),
        ("今天天气很好。", ["en", "zh"]),
        ("日本語です", ["ja"]),
        ("123, 456!", ["en"]),
        ("", ["en"]),
        ("Привет", []),
        ("Привет", ["en", "xx"]),
        ("[Japanese] はい", ["ja"]),
    ],
)
def test_a_text_in_a_known_script_is_taken(text: str, languages: list[str]) -> None:
    check_language(text, languages, "nano")
