"""Byte ranges and entity tags of an answer."""

import pytest

from services.gateway.ranges import answer, part_of

DATA = bytes(range(10))


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-", range(0, 10)),
        ("bytes=2-5", range(2, 6)),
        ("bytes=8-99", range(8, 10)),
        ("bytes=-3", range(7, 10)),
        ("bytes=-99", range(0, 10)),
        ("bytes=10-", range(10, 10)),
        ("bytes=-0", range(10, 10)),
        ("bytes=5-2", None),
        ("bytes=-", None),
        ("bytes=0-1,4-5", None),
        ("seconds=0-1", None),
        (f"bytes={'9' * 19}-", None),
    ],
)
def test_a_range_is_read_or_ignored(asked: str, part: range | None) -> None:
    assert part_of(10, asked) == part


@pytest.mark.parametrize(
    ("asked", "status", "body"),
    [
        ({}, 200, DATA),
        ({"range": "bytes=2-3"}, 206, DATA[2:4]),
        ({"range": "bytes=10-"}, 416, b""),
        ({"range": "bytes=2-3", "if-range": '"a"'}, 206, DATA[2:4]),
        ({"range": "bytes=2-3", "if-range": '"b"'}, 200, DATA),
        ({"if-none-match": '"a"'}, 304, b""),
        ({"if-none-match": '"b", W/"a"'}, 304, b""),
        ({"if-none-match": '"b"', "range": "bytes=0-0"}, 206, DATA[:1]),
    ],
)
def test_an_answer_is_whole_a_part_or_nothing(asked: dict[str, str], status: int, body: bytes) -> None:
    made = answer(DATA, "audio/wav", {"etag": '"a"'}, asked)
    assert (made.status_code, made.body) == (status, body)
    assert made.headers["accept-ranges"] == "bytes"


def test_a_part_says_where_it_lies() -> None:
    assert answer(DATA, "audio/wav", {}, {"range": "bytes=-3"}).headers["content-range"] == "bytes 7-9/10"
    assert answer(DATA, "audio/wav", {}, {"range": "bytes=99-"}).headers["content-range"] == "bytes */10"
