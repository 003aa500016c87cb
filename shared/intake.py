"""Takes edits that are submitted over the bus: each submission becomes one job, and its first step is published.

The submission's offset is committed when its job is stored, so none is lost; its id makes the job idempotent, so none
is done twice. Each is answered on the topic of results, as accepted or rejected; one that cannot be read goes to the
dead letters as well. Webhooks are left in the outbox, for a gateway to send. Knows nothing about HTTP.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque

from shared import outbox, telemetry
from shared.bus.port import Bus, Delivery, Partition, Subscription
from shared.checkpoints.layout import Checkpoint
from shared.errors import EditxError, PermanentError, PoisonError, TransientError
from shared.jobs import machine
from shared.jobs.port import Idempotency, IdempotencyConflict, JobStore
from shared.publishing import publish_rejection, publish_result, publish_step, publish_unreadable
from shared.recordings import StoredVoices, uploaded
from shared.schemas.edit import Edit
from shared.schemas.exchange import SUBMISSIONS, Submission, sender_of
from shared.schemas.job import Job, new_job_id
from shared.schemas.messages import TRACE_HEADERS
from shared.schemas.request import JobRequest
from shared.schemas.route import job_prefix, source_key
from shared.store.port import ArtifactStore
from shared.tags import check_tag, check_text_tags

log = logging.getLogger(__name__)
GROUP = "editx-intake"
BATCH = 16
AGAIN_S = 1.0


class Intake:
    """Reads submissions until it is told to stop. Several may run at once.

    Where the `checkpoint` is known, what it cannot do is rejected; else the job's step fails.
    """

    def __init__(
        self,
        bus: Bus,
        store: ArtifactStore,
        jobs: JobStore,
        *,
        keep_s: float | None = None,
        poll_s: float = 0.25,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self._bus = bus
        self._store = store
        self._jobs = jobs
        self._keep_s = keep_s
        self._poll_s = poll_s
        self._checkpoint = checkpoint
        self._pending: deque[Delivery] = deque()
        self._stopping = threading.Event()

    def run(self) -> None:
        """Work until `stop`."""
        reader = self._bus.subscribe([SUBMISSIONS], GROUP, on_revoked=self._forget)
        try:
            while not self._stopping.is_set():
                if self._pending:
                    reader.pause(reader.assignment())
                else:
                    reader.resume(reader.assignment())
                self._pending += reader.poll(AGAIN_S if self._pending else self._poll_s, max_records=BATCH)
                self._work(reader)
        finally:
            reader.close()

    def stop(self) -> None:
        """Take nothing more. Returns at once."""
        self._stopping.set()

    def accept(self, submission: Submission, trace: dict[str, str] | None = None, *, tell: bool = False) -> Job:
        """The job of a submission, stored and with its first step published; an earlier one if it came before.

        With `tell` the topic of results says so, before any end of the job. Raises UserError for one that cannot be
        done, TransientError when something is away.
        """
        job_id = new_job_id()
        request = self._stored(job_id, submission)
        moved = machine.accept(
            request, self._jobs.now(), job_id=job_id, owner=submission.owner, trace=trace, keep_s=self._keep_s
        )
        job = moved.job.model_copy(update={"reference": submission.submission_id})
        once = Idempotency(f"submission:{submission.submission_id}", _fingerprint(submission))
        if request.webhook_url is not None:
            outbox.remember(self._store, job_id, 0, self._jobs.now())
        try:
            created = self._jobs.create(job, moved.events, idempotency=once)
        except IdempotencyConflict:
            self._forget_all(job_id)
            raise
        if not created.is_new:
            self._forget_all(job_id)
        if tell:
            publish_result(self._bus, created.job)
        if not created.job.is_terminal and created.job.dispatched < created.job.step_index:
            return publish_step(self._bus, self._jobs, created.job)
        return created.job

    def _forget_all(self, job_id: str) -> None:
        """Nothing came of this job. Where the job store did not answer that is not known, and everything stays."""
        self._store.delete_prefix(job_prefix(job_id))
        self._store.delete(outbox.outbox_key(job_id))

    def _stored(self, job_id: str, submission: Submission) -> JobRequest:
        """The request of a job, its tags in published spelling and its recording in the store.

        Raises UserError for a tag, text, upload or voice that cannot be used.
        """
        asked, text, data = submission.request, submission.request.text, submission.audio
        if submission.upload_id is not None:
            data = uploaded(self._store, submission.owner, submission.upload_id)
        elif submission.voice is not None:
            voice, data = StoredVoices(self._store).reference(submission.owner, submission.voice)
            text = text or voice.text
        edit = None if asked.edit is None else _published(asked.edit)
        text = text if edit is None or edit.needs_source_text else None
        request = JobRequest.model_construct(**{**dict(asked), "edit": edit, "text": text})
        if self._checkpoint is not None:
            check_served(request, self._checkpoint)
        if data is not None:
            self._store.put(source_key(job_id), data)
        elif request.source_key is not None:
            self._store.stat(request.source_key)
        return request

    def _work(self, reader: Subscription) -> None:
        """Accept what came, in order; what waits for something that is away stays pending."""
        done: dict[Partition, int] = {}
        while self._pending:
            delivery = self._pending[0]
            try:
                self._one(delivery)
            except TransientError as error:
                log.warning("the submission at %s offset %d waits: %s", delivery.partition, delivery.offset, error)
                break
            done[delivery.partition] = delivery.offset + 1
            self._pending.popleft()
        try:
            if done:
                reader.commit(done)
        except TransientError as error:
            log.warning("commit of %s put off: %s", done, error)

    def _forget(self, partitions: frozenset[Partition]) -> None:
        self._pending = deque(delivery for delivery in self._pending if delivery.partition not in partitions)

    def _one(self, delivery: Delivery) -> None:
        headers = {name: value.decode("utf-8", "replace") for name, value in delivery.headers if name in TRACE_HEADERS}
        with telemetry.processing(
            delivery.topic,
            headers,
            job_id=delivery.key,
            group=GROUP,
            partition=delivery.partition.number,
            offset=delivery.offset,
            attempt=1,
            system=self._bus.system,
        ):
            try:
                self._answer(Submission.from_record(delivery.value), telemetry.inject() or headers)
            except PoisonError as error:
                log.error("unreadable submission at %s offset %d: %s", delivery.partition, delivery.offset, error)
                publish_unreadable(self._bus, delivery, error)
                if sender := sender_of(delivery.value):
                    publish_rejection(self._bus, *sender, error)
            except TransientError:
                raise
            except Exception as error:  # nobody foresaw it; the submissions behind this one must not wait for it
                log.exception("the submission at %s offset %d was not taken", delivery.partition, delivery.offset)
                publish_unreadable(self._bus, delivery, PermanentError(f"{type(error).__name__}: {error}"))

    def _answer(self, submission: Submission, trace: dict[str, str]) -> None:
        """Make a job of a submission, or tell its sender why not. Raises TransientError when something is away."""
        try:
            job = self.accept(submission, trace, tell=True)
        except TransientError:
            raise
        except EditxError as error:
            log.warning("the submission %s was rejected: %s", submission.submission_id, error)
            publish_rejection(self._bus, submission.submission_id, submission.owner, error)
        else:
            log.info("the submission %s is the job %s", submission.submission_id, job.id)


def check_served(request: JobRequest, checkpoint: Checkpoint) -> None:
    """Raise UserError for a text in none of the checkpoint's languages, and for candidates that nobody can judge."""
    if request.edit is not None:
        checkpoint.metadata.check_languages(request.text, request.edit.target_text)
    checkpoint.metadata.check_candidates(request.n_best, has_reward=checkpoint.has_reward)


def _published(edit: Edit) -> Edit:
    """The edit with its tags in published spelling. Raises UserError for one that nobody knows."""
    changes = {}
    if edit.detail is not None:
        changes["detail"] = check_tag(edit.type, edit.detail)
    if edit.target_text is not None:
        changes["target_text"] = check_text_tags(edit.target_text)
    return edit.model_copy(update=changes)


def _fingerprint(submission: Submission) -> str:
    return hashlib.sha256(submission.model_dump_json().encode()).hexdigest()
