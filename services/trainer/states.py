"""Saved states of training jobs in the artifact store, so that any worker can go on with a job.

Knows run folders and the store's port, not jobs or training.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

from services.trainer.core.runs import LOG, STATE
from shared.errors import PermanentError
from shared.store.port import ArtifactNotFound, ArtifactStore

KEPT = ("config.json", "versions.json", STATE, LOG, "prompts.json")


@dataclass(frozen=True)
class States:
    """States by the id of their job, in `store`."""

    store: ArtifactStore

    def keep(self, job_id: str, folder: Path) -> None:
        """Put the state of a run folder into the store."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name in KEPT:
                if (folder / name).exists():
                    archive.add(folder / name, name)
        self.store.put(self._key(job_id), packed.getvalue())

    def take_up(self, job_id: str, folder: Path) -> None:
        """Bring the state of another worker into a run folder that has none; nothing happens without one.

        Raises PermanentError for a state that holds other files.
        """
        if (folder / STATE).exists():
            return
        try:
            packed = self.store.get(self._key(job_id))
        except ArtifactNotFound:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            if {member.name for member in archive} - set(KEPT):
                raise PermanentError(
                    f"The saved state of {job_id} holds unexpected files.", "Delete it to start again."
                )
            archive.extractall(folder, filter="data")

    def forget(self, job_id: str) -> None:
        """Remove a job's state."""
        self.store.delete(self._key(job_id))

    @staticmethod
    def _key(job_id: str) -> str:
        return f"training/{job_id}/state.tar"
