"""The hosted system as a system under test: every clone and edit of a benchmark is a job, by way of its gateway.

As many jobs are on the bus as the benchmark has cases at work, so workers of every service share them.
"""

from __future__ import annotations

from editx.remote import RemoteEditor
from shared.audio.io import Waveform
from shared.schemas import JobRequest
from shared.schemas.edit import Edit
from shared.schemas.request import DecodeSettings, GenerateSettings


class GatewaySystem:
    """Clones and edits by jobs in the batch lane; of `n_best` answers to an edit the best scored one is kept.

    Many threads may call it.
    """

    def __init__(
        self, editor: RemoteEditor, decode_steps: int = 10, temperature: float | None = None, n_best: int = 1
    ) -> None:
        self._editor, self._n_best = editor, n_best
        self._generate, self._decode = GenerateSettings(temperature=temperature), DecodeSettings(steps=decode_steps)

    def clone(self, reference: Waveform, reference_text: str, text: str, seed: int) -> Waveform:
        """The text in the reference's voice. Raises EditxError for a job that failed."""
        return self._done(reference, Edit(type="clone", target_text=text), reference_text, seed)

    def edit(self, source: Waveform, text: str, edit: Edit, seed: int) -> Waveform:
        """The edited recording; `text` is what the source says. Raises EditxError for a job that failed."""
        return self._done(source, edit, text, seed, self._n_best)

    def _done(self, source: Waveform, edit: Edit, text: str, seed: int, n_best: int = 1) -> Waveform:
        request = JobRequest(edit=edit, text=text, seed=seed, n_best=n_best, generate=self._generate,
                             decode=self._decode, lane="batch")  # fmt: skip
        return self._editor.run(source, request).audio
