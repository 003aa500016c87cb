"""Faults under load, and what must hold afterwards: nothing accepted is lost, every job ends once, its effect is there
once, and its history never goes backwards.

`python -m editx.stack.chaos --rounds N` starts a stack of null models (`--triton`: of the bundled checkpoint behind
Triton), submits jobs all the while, kills, pauses and cuts off its processes in rotation, ends the faults, waits, and
checks the recorded history of every accepted job.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import numpy as np

from editx.stack.proxy import EVERYBODY, Proxy
from editx.stack.stack import ORDER, Options, Stack
from shared.audio.io import Waveform, write_audio
from shared.deadletters import dead_letters
from shared.errors import TransientError
from shared.intake import Intake
from shared.schemas import Edit, Job, JobState, Lane
from shared.schemas.exchange import RESULTS, Result, Submission, SubmittedRequest
from shared.schemas.route import DLQ_FAILED
from shared.store.port import ArtifactStore
from shared.sweeper import Sweeper

PAUSE_S = 4.0
"""Longer than the lease of the workers under test."""
LEASE_S = 3.0
ACCEPT_PATIENCE_S = 60.0
UNLIMITED = dict.fromkeys(
    ("EDITX_REQUESTS_PER_MINUTE", "EDITX_OPEN_JOBS_MAX", "EDITX_BACKLOG_INTERACTIVE_MAX", "EDITX_BACKLOG_BATCH_MAX"),
    "1000000",
)
"""The gateway refuses nothing: what is under test is what it accepts."""
DETOUR = 6
"""The proxies that cut processes off listen on ports this much above the servers'."""


@dataclass
class Report:
    """What was done, and what was found wrong."""

    accepted: int = 0
    resent: int = 0
    checked: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    takeovers: int = 0
    slowest_s: float = 0.0
    drained_s: float = 0.0
    findings: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items()))
        ends = ", ".join(f"{count} {name}" for name, count in sorted(self.ends.items()))
        lines = [
            f"{sum(self.faults.values())} faults: {faults}",
            f"{self.accepted} jobs accepted: {ends}; {self.retries} retries, {self.takeovers} steps taken over",
            f"{self.resent} submissions sent again; {self.checked} artifacts match the hashes in their jobs' records",
            f"slowest job {self.slowest_s:.1f} s; all ended {self.drained_s:.1f} s after the last fault",
            f"{len(self.findings)} findings" + "".join(f"\n  {finding}" for finding in self.findings),
        ]
        if self.findings:
            lines.append(f"faults: {', '.join(self.log)}")
        return "\n".join(lines)


class Load:
    """Submits a job every `every_s` seconds until it is stopped, by turns as the intake does and over HTTP; an accepted
    one is remembered.

    A submission that fails is sent again under its key, as a client would.
    """

    def __init__(self, stack: Stack, every_s: float) -> None:
        self.accepted: list[str] = []
        self.resent = 0
        self._http = httpx.Client(base_url=stack.urls["EDITX_PUBLIC_URL"], timeout=10.0)
        self._bus, self._jobs, self._store = stack.bus(), stack.jobs(), stack.store()
        self._intake = Intake(self._bus, self._store, self._jobs)
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        samples = np.random.default_rng(0).normal(0, 0.1, 8_000).astype(np.float32)
        self._audio = write_audio(Waveform(samples, 16_000), None, "wav") or b""

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=ACCEPT_PATIENCE_S + 30.0)
        self._bus.close()
        self._jobs.close()
        self._http.close()

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set():
            submit = (self._over_http, self._by_intake)[number % 2]
            until = time.monotonic() + ACCEPT_PATIENCE_S
            while time.monotonic() < until:
                try:
                    self.accepted.append(submit(number))
                    break
                except (TransientError, httpx.HTTPError):
                    self.resent += 1
                    time.sleep(0.2)
            number += 1
            self._stop.wait(self._every_s)

    def _by_intake(self, number: int) -> str:
        request = SubmittedRequest(edit=Edit(type="denoise"), iterations=_iterations(number), lane=_lane(number))
        submission = Submission.model_construct(
            schema_version=1, submission_id=f"chaos-{number}", owner="chaos", request=request, audio=self._audio
        )
        return self._intake.accept(submission).id

    def _over_http(self, number: int) -> str:
        answer = self._http.post(
            "/v1/audio/edits",
            data={"type": "denoise", "iterations": str(_iterations(number)), "lane": _lane(number)},
            files={"audio": ("a.wav", self._audio, "audio/wav")},
            headers={"Idempotency-Key": f"chaos-{number}"},
        )
        return str(answer.raise_for_status().json()["id"])


def _iterations(number: int) -> int:
    return 1 + number // 2 % 2


def _lane(number: int) -> Lane:
    return "batch" if number % 3 == 2 else "interactive"


def faults(stack: Stack, proxies: Mapping[str, Proxy], servers: Sequence[str]) -> list[tuple[str, Callable[[], None]]]:
    """The faults of one round, each with its name; every one ends with all processes running again.

    Workers suffer all of them, and so do the `servers` named; the gateway dies while it takes jobs.
    """
    workers = [name for name in stack.names() if name.partition("-")[0] in stack.options.services]

    def kill(name: str) -> None:
        stack.restart(name, kill=True)

    def pause(name: str) -> None:
        stack.signal(name, signal.SIGSTOP)
        time.sleep(PAUSE_S)
        stack.signal(name, signal.SIGCONT)

    def cut(away: Sequence[str], pids: Iterable[int]) -> None:
        for name in away:
            proxies[name].cut(pids)
        time.sleep(PAUSE_S)
        for name in away:
            proxies[name].heal()

    def some() -> str:
        return random.choice(workers)

    chosen: list[tuple[str, Callable[[], None]]] = [
        ("kill worker", lambda: kill(some())),
        ("pause worker", lambda: pause(some())),
        ("drain worker", lambda: stack.restart(some())),
        ("cut worker off", lambda: cut(list(proxies), [stack.pids()[some()]])),
        ("cut worker off from redis", lambda: cut(["redis"], [stack.pids()[some()]])),
        ("kill gateway", lambda: kill("gateway")),
    ]
    for server in servers:
        chosen += [
            (f"kill {server}", partial(kill, server)),
            (f"pause {server}", partial(pause, server)),
            (f"cut {server} off", partial(cut, [server], EVERYBODY)),
        ]
    if servers:
        chosen.append(("kill intake", lambda: kill("intake")))
    return chosen


def run(folder: Path, *, rounds: int, port: int, every_s: float = 0.1, servers: bool = True, seed: int = 0,
        between_s: float = 1.0, patience_s: float = 120.0, workers: int = 2,
        triton: bool = False) -> Report:  # fmt: skip
    """Start a stack, torment it for `rounds` rounds of all faults, and check what is left.

    `servers` have faults too, not only workers; `triton` is one of them then.
    """
    random.seed(seed)
    services = ("tokenizer", "llm", "decoder")
    options = Options(
        port=port, inference="triton" if triton else "null", services=services, workers=workers, slots=2,
        lease_s=LEASE_S, detour=DETOUR,
        settings={"EDITX_NULL_S": "0.05", "EDITX_SWEEP_EVERY_S": "2", **UNLIMITED},
    )  # fmt: skip
    stack, report = Stack(folder, options), Report()
    tormented = [name for name in ORDER if servers and name in stack.server_ports]
    proxies = {name: Proxy(at + DETOUR, at) for name, at in stack.server_ports.items()}
    try:
        stack.up()
        with Load(stack, every_s) as load:
            time.sleep(between_s)
            for _ in range(rounds):
                chosen = faults(stack, proxies, tormented)
                random.shuffle(chosen)
                for name, fault in chosen:
                    report.log.append(f"{name} at {time.time():.1f}")
                    fault()
                    report.faults[name] += 1
                    time.sleep(between_s)
        report.resent = load.resent
        _settle(stack, load.accepted, report, patience_s)
        _check(stack, load.accepted, report)
    finally:
        stack.down()
        for proxy in proxies.values():
            proxy.close()
    return report


def _settle(stack: Stack, accepted: list[str], report: Report, patience_s: float) -> None:
    """Wait until every accepted job has ended. The sweeper is asked at once instead of after its grace."""
    began, jobs, bus = time.monotonic(), stack.jobs(), stack.bus()
    sweeper = Sweeper(jobs, bus, stack.store())
    open_jobs, swept_at = set(accepted), began
    while open_jobs and time.monotonic() - began < patience_s:
        open_jobs = {job_id for job_id in open_jobs if not jobs.get(job_id).is_terminal}
        if open_jobs and time.monotonic() - swept_at > 10.0:
            sweeper.sweep(everything=True)
            swept_at = time.monotonic()
        time.sleep(0.1)
    report.drained_s = time.monotonic() - began
    report.findings += [f"{job_id} never ended: it is {jobs.get(job_id).state.value}" for job_id in sorted(open_jobs)]
    bus.close()
    jobs.close()


def _check(stack: Stack, accepted: list[str], report: Report) -> None:
    """The invariants, over the history of every accepted job."""
    jobs, store, bus = stack.jobs(), stack.store(), stack.bus()
    report.accepted = len(accepted)
    if len(set(accepted)) != len(accepted):
        report.findings.append("two submissions became one job")
    letters = {letter.delivery.key for letter in dead_letters(bus) if letter.delivery.topic == DLQ_FAILED}
    results = _results(bus, set(accepted))
    for job_id in accepted:
        job = jobs.get(job_id)
        report.ends[job.state.value] += 1
        report.slowest_s = max(report.slowest_s, (job.finished_at or 0.0) - job.created_at)
        report.findings += [f"{job_id}: {finding}" for finding in _history(stack, job, report)]
        if job.state == JobState.DONE:
            if job_id in letters:
                report.findings.append(f"{job_id}: done and among the dead letters")
            report.findings += [f"{job_id}: {finding}" for finding in _contents(store, job, report)]
            outputs = [info for info in store.list(f"jobs/{job_id}/") if info.key.endswith("-decode/audio.wav")]
            if len(outputs) != len(job.result_keys):
                report.findings.append(f"{job_id}: {len(outputs)} outputs for {len(job.result_keys)} iterations")
        told = results.get(job_id, set())
        if told != {"failed" if job.state == JobState.FAILED else job.state.value}:
            report.findings.append(
                f"{job_id}: is {job.state.value}, told as {sorted(told)}; ended at {job.finished_at or 0.0:.1f}"
            )
    bus.close()
    jobs.close()


def _contents(store: ArtifactStore, job: Job, report: Report) -> Iterator[str]:
    """Which artifacts of a job that is done are not those that its record names.

    A record takes a hash only from the attempt that held the lease to its end, so a stale worker's write would show.
    """
    hashes = {
        job.route.steps[timing.index].output_key(job.id, name): digest
        for timing in job.timings
        for name, digest in timing.artifacts.items()
    }
    yield from (f"{key} has no hash in the record" for key in job.result_keys if key not in hashes)
    for key, digest in hashes.items():
        report.checked += 1
        if hashlib.sha256(store.get(key)).hexdigest() != digest:
            yield f"{key} is not what its step wrote"


def _history(stack: Stack, job: Job, report: Report) -> Iterator[str]:
    """What is wrong with the events of one job."""
    jobs = stack.jobs()
    events = jobs.events(job.id)
    jobs.close()
    if [event.seq for event in events] != list(range(1, len(events) + 1)):
        yield "its events have gaps"
    order = {JobState.ACCEPTED: 0, JobState.RUNNING: 1}
    ranks = [order.get(event.state, 2) for event in events]
    if ranks != sorted(ranks):
        yield f"its state went backwards: {[event.state.value for event in events]}"
    if [event.step_index for event in events] != sorted(event.step_index for event in events):
        yield "its steps went backwards"
    if sum(event.type in ("done", "failed", "cancelled") for event in events) != 1:
        yield f"it has not one end: {[event.type for event in events]}"
    steps = [event.step_index for event in events if event.type == "step"]
    if len(steps) != len(set(steps)):
        yield "a step was done twice"
    report.retries += sum(event.type == "retry" for event in events)
    report.takeovers += (
        sum(event.type == "started" for event in events) - len(steps) - sum(event.type == "retry" for event in events)
    )


def _results(bus: object, wanted: set[str], patience_s: float = 30.0) -> dict[str, set[str]]:
    """What the topic of results says about each job."""
    told: dict[str, set[str]] = {}
    reader = bus.subscribe([RESULTS], f"chaos-{time.time_ns()}")  # type: ignore[attr-defined]
    until = time.monotonic() + patience_s
    while time.monotonic() < until and wanted - told.keys():
        for delivery in reader.poll(0.2, max_records=500):
            result = Result.model_validate_json(delivery.value)
            if result.state != "accepted":
                told.setdefault(result.job_id, set()).add(result.state)
    reader.close()
    return told


def main() -> int:
    """The command line; 1 if anything was found."""
    parser = argparse.ArgumentParser(description="Faults under load against a local stack.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="of each service")
    parser.add_argument("--port", type=int, default=18_200)
    parser.add_argument("--triton", action="store_true", help="with the bundled checkpoint behind Triton")
    parser.add_argument("--every", type=float, help="seconds between two jobs; 0.1, with --triton 1.5")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="editx-chaos-") as folder:
        report = run(
            Path(folder), rounds=arguments.rounds, port=arguments.port, seed=arguments.seed, workers=arguments.workers,
            triton=arguments.triton, every_s=arguments.every or (1.5 if arguments.triton else 0.1),
        )  # fmt: skip
    sys.stdout.write(f"{arguments.rounds} rounds, seed {arguments.seed}\n{report}\n")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
