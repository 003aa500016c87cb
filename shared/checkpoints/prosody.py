"""What measures the prosody of audio tokens, from a checkpoint's flow and vocoder."""

from __future__ import annotations

from shared.checkpoints.decoder import load_flow, load_vocoder
from shared.checkpoints.layout import Checkpoint, InvalidCheckpoint
from shared.models.spectral import SpectralRows
from shared.prosody import Prosody


def load_prosody(checkpoint: Checkpoint) -> Prosody:
    """In float32, on the CPU. Raises MissingComponent, and InvalidCheckpoint where the vocoder is of another kind."""
    vocoder = load_vocoder(checkpoint)
    if not isinstance(vocoder, SpectralRows):
        raise InvalidCheckpoint(
            f"The vocoder of {checkpoint.root} cannot measure the manner of audio tokens.",
            'Take "manners" out of its editx.json: only a spectral vocoder can.',
        )
    flow = load_flow(checkpoint).requires_grad_(False)
    del flow.decoder  # nothing is sampled here
    return Prosody(flow, vocoder.model.f0_predictor)
