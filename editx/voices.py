"""The user's own voices on this machine: a reference recording and what it says, under a name.

A voice is a folder with reference.wav and voice.json. Knows nothing about models.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.audio.io import Waveform, read_audio, write_audio
from shared.errors import UserError
from shared.files import make_folder, write_atomically

HOME_VARIABLE = "EDITX_HOME"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Voice:
    """A stored voice. `duration_s` is the reference's length."""

    name: str
    text: str
    duration_s: float
    added_at: float


class VoiceBook:
    """The voices in a folder; by default $EDITX_HOME/voices, or ~/.local/share/editx/voices."""

    def __init__(self, root: Path | None = None) -> None:
        home = os.environ.get(HOME_VARIABLE)
        self.root = root or (Path(home) if home else Path.home() / ".local" / "share" / "editx") / "voices"

    def add(self, name: str, reference: Waveform, text: str, *, replace: bool = False) -> Voice:
        """Store a voice. Raises UserError for a bad name, a blank text, or a name that is taken."""
        if not text.strip():
            raise UserError(
                "The reference's text is missing.", "Say what the recording says with --text.", "missing_text"
            )
        folder = self._folder(name)
        if folder.exists() and not replace:
            raise UserError(f"There is a voice {name} already.", "Use --replace, or another name.", "voice_exists")
        make_folder(folder)
        voice = Voice(name, text.strip(), round(reference.duration_s, 3), time.time())
        write_audio(reference, folder / "reference.wav", "wav")
        write_atomically(folder / "voice.json", json.dumps(asdict(voice), ensure_ascii=False).encode())
        return voice

    def list(self) -> list[Voice]:
        """The voices by name."""
        return [self.get(path.parent.name) for path in sorted(self.root.glob("*/voice.json"))]

    def get(self, name: str) -> Voice:
        """A voice. Raises UserError if there is none of this name."""
        path = self._folder(name) / "voice.json"
        try:
            return Voice(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise UserError(
                f"There is no voice {name}.", "`editx voices list` shows them.", "voice_not_found"
            ) from error
        except (ValueError, TypeError) as error:
            raise UserError(f"The voice file {path} is damaged.", "Remove the voice and add it again.") from error

    def reference(self, name: str) -> Waveform:
        """A voice's recording."""
        self.get(name)
        return read_audio(self._folder(name) / "reference.wav")

    def remove(self, name: str) -> None:
        """Delete a voice. Raises UserError if there is none of this name."""
        self.get(name)
        shutil.rmtree(self._folder(name))

    def _folder(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{name!r} is no name for a voice.", "Use up to 64 letters, digits, dots, dashes.", "voice_name"
            )
        return self.root / name
