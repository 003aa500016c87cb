"""Clones on the whole local stack with the small checkpoint: audio seconds per second and time to first audio.

A part of `python -m benchmarks.stack`. Every call clones one short recording: as a job, which is what the models can
batch, and as speech that is streamed while it is made.
"""

from __future__ import annotations

import base64
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from editx.stack.stack import Options, Stack

AUDIO = Path(__file__).parents[1] / "tests/data/audio"
SENTENCES = (
    "The train leaves at seven in the morning.",
    "Please close the window, it is getting cold in here.",
    "She opened the letter and read it twice.",
)
BYTES_PER_S = 2 * 24_000
CALLS_EACH = 4


@dataclass(frozen=True)
class Call:
    """One answer, in seconds."""

    first_audio_s: float
    audio_s: float


def call(client: httpx.Client, text: str, seed: int) -> Call:
    """Ask for speech and read all of it."""
    body = {
        "input": text,
        "reference_audio": base64.b64encode((AUDIO / "en_happy_prompt.wav").read_bytes()).decode(),
        "reference_text": (AUDIO / "en_happy_prompt.txt").read_text().strip(),
        "response_format": "pcm",
        "seed": seed,
    }
    began, first_s, size = time.perf_counter(), 0.0, 0
    with client.stream("POST", "/v1/audio/speech", json=body) as answer:
        if answer.is_error:
            raise RuntimeError(f"{answer.status_code}: {answer.read().decode()}")
        for piece in answer.iter_bytes():
            first_s = first_s or time.perf_counter() - began
            size += len(piece)
    return Call(first_s, size / BYTES_PER_S)


def job(client: httpx.Client, text: str, seed: int) -> Call:
    """Ask for a clone as a job and wait for its end; it has no first audio before its last."""
    fields = {"type": "clone", "text": (AUDIO / "en_happy_prompt.txt").read_text().strip(), "target_text": text,
              "seed": str(seed)}  # fmt: skip
    began = time.perf_counter()
    answer = client.post("/v1/audio/edits", data=fields, files={"audio": (AUDIO / "en_happy_prompt.wav").read_bytes()},
                         headers={"prefer": "wait=30"})  # fmt: skip
    answer.raise_for_status()
    document = answer.json()
    while document["status"] not in ("done", "failed", "cancelled"):
        document = client.get(f"/v1/jobs/{document['id']}", headers={"prefer": "wait=30"}).json()
    if document["status"] != "done":
        raise RuntimeError(f"the job {document['id']} is {document['status']}: {document.get('error')}")
    return Call(time.perf_counter() - began, document["steps"][-1]["metrics"]["audio_s"])


Ask = Callable[[httpx.Client, str, int], Call]


def at(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def at_once(ask: Ask, url: str, concurrency: int, seconds: float) -> tuple[list[Call], float]:
    """Calls by `concurrency` clients, each several in a row but none begun after `seconds`; and what all took."""
    found: list[Call] = []
    numbers, began = itertools.count(), time.perf_counter()

    def client() -> None:
        with httpx.Client(base_url=url, timeout=600.0) as http:
            for _ in range(CALLS_EACH):
                if time.perf_counter() - began < seconds:
                    number = next(numbers)
                    found.append(ask(http, SENTENCES[number % len(SENTENCES)], number))

    pool = [threading.Thread(target=client) for _ in range(concurrency)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    return found, time.perf_counter() - began


def speech(concurrencies: Sequence[int], seconds: float, port: int) -> None:
    """Start a stack and print a line per concurrency."""
    most = max(concurrencies)
    settings = {"EDITX_SPEECH_MAX": str(most), "EDITX_REQUESTS_PER_MINUTE": "100000", "EDITX_SLOTS": str(most)}
    options = Options(port=port, services=("tokenizer", "llm", "decoder"), settings=settings)
    with tempfile.TemporaryDirectory() as folder:
        stack = Stack(Path(folder), options)
        try:
            stack.up()
            url = stack.urls["EDITX_PUBLIC_URL"]
            print("way      calls at once   answers   audio s/s   times   first audio p50 s   p99 s")
            for way, ask in (("jobs", job), ("speech", call)):
                at_once(ask, url, 1, 1.0)
                alone = 0.0
                for concurrency in concurrencies:
                    found, took_s = at_once(ask, url, concurrency, seconds)
                    first = sorted(one.first_audio_s for one in found)
                    rate = sum(one.audio_s for one in found) / took_s
                    alone = alone or rate
                    print(
                        f"{way:<8} {concurrency:>13} {len(found):>9} {rate:>11.2f} {rate / alone:>7.2f}"
                        f" {statistics.median(first):>19.2f} {at(first, 0.99):>7.2f}",
                        flush=True,
                    )
        finally:
            stack.down()
