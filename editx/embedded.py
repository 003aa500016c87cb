"""The whole system in one process: the one place that decides which adapters the embedded shape uses.

Bus in memory, artifacts in a folder, jobs in memory or SQLite, models in this process, one thread per worker. Models
load when a step first needs them. The same job goes through the same handlers, routes and worker runtime as in the
hosted shapes.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from services.decoder.handler import DecodeHandler
from services.llm.handler import GenerateHandler
from services.reward.handler import ScoreHandler
from services.tokenizer.handler import TokenizeHandler
from shared import telemetry
from shared.bus.memory import MemoryBus
from shared.checkpoints.layout import Checkpoint
from shared.errors import PermanentError
from shared.inference.local import LocalInference, ModelFactory
from shared.inference.port import Model
from shared.jobs import machine
from shared.jobs.memory import MemoryJobStore
from shared.jobs.port import Idempotency, JobStore
from shared.jobs.sqlite import SqliteJobStore
from shared.prompts import TextTokenizer, Turn
from shared.publishing import publish_step
from shared.retry import RetryPolicy
from shared.schemas import Job, JobEvent, JobRequest, new_job_id
from shared.schemas.route import job_prefix, source_key
from shared.steps import Handler
from shared.store.folder import FolderStore
from shared.sweeper import Sweeper
from shared.tags import check_tag, check_text_tags
from shared.worker import Worker, WorkerSettings

EVENT_WAIT_S = 1.0
SLOTS = 4  # jobs that a kind of step works on at once: they share batches
IMPATIENT = RetryPolicy(attempts_max=3, attempts_unknown_max=1, base_s=0.2)


class Embedded:
    """The system of one process. Use it as a context manager, or call `close`.

    `folder` keeps jobs and artifacts between runs; without it they lie in a temporary folder and go with the process.
    `models` replaces models by name (tests do that).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        folder: Path | None = None,
        device: str = "cpu",
        models: Mapping[str, ModelFactory] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="editx-")
        root = folder or Path(self._temporary.name if self._temporary else "")
        self.bus = MemoryBus()
        self.store = FolderStore(root / "artifacts")
        self.jobs: JobStore = SqliteJobStore(root / "jobs.sqlite") if folder else MemoryJobStore()
        self.inference = LocalInference({**_models(checkpoint, device), **(models or {})}, concurrent=["llm"])
        self._brings_reward = "reward" in (models or {})
        self._sweeper = Sweeper(self.jobs, self.bus, self.store)
        self._workers: list[tuple[Worker, threading.Thread]] = []
        self._crash: BaseException | None = None
        self._lock = threading.Lock()
        self._text_tokenizer: TextTokenizer | None = None

    def start(self) -> Self:
        """Start the workers, and take up the jobs that an earlier process of the same folder left open."""
        handlers: list[Handler] = [
            TokenizeHandler(self.inference),
            GenerateHandler(self.inference, self._encode),
            ScoreHandler(self.inference, self._encode),
            DecodeHandler(self.inference),
        ]
        for handler in handlers:
            settings = WorkerSettings(
                group=f"editx-{handler.kind}", slots=SLOTS, poll_s=0.1, watch_s=0.2, drain_s=5.0, retry=IMPATIENT
            )
            worker = Worker(handler, self.bus, self.store, self.jobs, settings)
            thread = threading.Thread(target=self._work, args=(worker,), name=f"worker-{handler.kind}", daemon=True)
            self._workers.append((worker, thread))
            thread.start()
        self._sweeper.sweep(everything=True)
        self._sweeper.start()
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(
        self, audio: bytes, request: JobRequest, *, owner: str = "local", idempotency: Idempotency | None = None
    ) -> Job:
        """Accept a job about a recording (an audio file's bytes).

        Raises UserError for a tag or text that nobody knows.
        """
        check_request(request, self.checkpoint)
        if request.n_best > 1 and not self._brings_reward:
            from shared.checkpoints.reward import reward_folder

            reward_folder(self.checkpoint)
        job_id = new_job_id()
        with telemetry.span("submit job", {"messaging.message.conversation_id": job_id}):
            return self._submit(audio, request, job_id, owner, idempotency)

    def _submit(
        self, audio: bytes, request: JobRequest, job_id: str, owner: str, idempotency: Idempotency | None
    ) -> Job:
        accepted = machine.accept(request, self.jobs.now(), job_id=job_id, owner=owner, trace=telemetry.inject())
        self.store.put(request.source_key or source_key(accepted.job.id), audio)
        created = self.jobs.create(accepted.job, accepted.events, idempotency=idempotency)
        if not created.is_new:
            self.store.delete_prefix(job_prefix(accepted.job.id))
            return created.job
        return publish_step(self.bus, self.jobs, created.job)

    def events(self, job_id: str, after: int = 0) -> Iterator[JobEvent]:
        """The job's events from the one after `after`, as they come, to its end."""
        while True:
            for event in self.jobs.events(job_id, after=after, wait_s=EVENT_WAIT_S):
                yield event
                after = event.seq
                if event.is_last:
                    return
            if self._crash is not None:
                raise PermanentError("A worker died while the job ran.", "See the log.") from self._crash

    def wait(self, job_id: str, on_event: Callable[[JobEvent], None] | None = None) -> Job:
        """The job once it has ended, however it did."""
        for event in self.events(job_id):
            if on_event is not None:
                on_event(event)
        return self.jobs.get(job_id)

    def cancel(self, job_id: str) -> Job:
        """Ask for the job's end. Raises JobClosed, JobNotFound."""
        return machine.apply(self.jobs, job_id, machine.request_cancel)

    def close(self) -> None:
        """Let running steps finish or hand them back, then stop everything. Safe to call twice."""
        self._sweeper.stop()
        for worker, _ in self._workers:
            worker.stop()
        for _, thread in self._workers:
            thread.join(timeout=15.0)
        self.inference.close()
        self.bus.close()
        self.jobs.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _encode(self, turns: Sequence[Turn]) -> list[int]:
        with self._lock:
            if self._text_tokenizer is None:
                self._text_tokenizer = TextTokenizer.from_file(self.checkpoint.text_tokenizer_file)
        return self._text_tokenizer.encode_chat(turns)

    def _work(self, worker: Worker) -> None:
        try:
            worker.run()
        except BaseException as crash:
            self._crash = crash
            raise


def check_request(request: JobRequest, checkpoint: Checkpoint | None = None) -> None:
    """Raise UserError if a request names a tag that is not published, with the nearest known ones.

    With a checkpoint, a text that is in none of its languages is refused as well.
    """
    edit = request.edit
    if edit is not None and checkpoint is not None:
        checkpoint.metadata.check_languages(request.text, edit.target_text)
    if edit is not None and edit.detail is not None:
        check_tag(edit.type, edit.detail)
    if edit is not None and edit.target_text is not None:
        check_text_tags(edit.target_text)


def _models(checkpoint: Checkpoint, device: str) -> dict[str, ModelFactory]:
    def tokenizer() -> Model:
        from services.tokenizer.model import TokenizerModel

        return TokenizerModel(checkpoint, device=device)

    def llm() -> Model:
        from services.llm.model import LlmModel

        return LlmModel(checkpoint, device=device)

    def decoder() -> Model:
        from services.decoder.model import DecoderModel

        return DecoderModel(checkpoint, device=device)

    def reward() -> Model:
        from services.reward.model import RewardModel

        return RewardModel(checkpoint, device=device)

    return {"tokenizer": tokenizer, "llm": llm, "decoder": decoder, "reward": reward}
