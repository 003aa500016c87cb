"""The three encoders of the front end, loaded from a checkpoint and ready for lists of 16 kHz recordings.

Each takes rows of different length, computes those of similar length together, and gives every row the numbers that it
gives alone. Knows the published files, not where they lie (`Checkpoint` does), nor who asks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shared.artifacts import SPEAKER_SIZE
from shared.audio.features import (
    FRAME_400,
    STREAM_TAIL,
    MelConfig,
    linguistic_features,
    linguistic_frames,
    speaker_fbank,
    whisper_log_mel,
)
from shared.audio.signal import through_pcm16
from shared.checkpoints.decoder import read_config, read_yaml
from shared.checkpoints.layout import MALFORMED, Checkpoint, InvalidCheckpoint
from shared.checkpoints.unfilled import unfilled
from shared.checkpoints.weights import read_weights
from shared.codes import LINGUISTIC_SIZE, SEMANTIC_RATE_HZ, SEMANTIC_SIZE, Codes
from shared.models.linguistic import LinguisticConfig, LinguisticEncoder, nearest

RATE_HZ = 16000
PIECE_SAMPLES = 30 * RATE_HZ  # the semantic tokenizer was trained on at most 30 s
SHORTEST_PIECE = 480
BATCHED = "editx.batched"  # metadata key of ONNX files whose rows may be padded and computed together
_REFETCH = "It is truncated, damaged or of another model: fetch it again."


class LinguisticTokenizer:
    """Recordings to linguistic codes: features, SAN-M encoder, nearest centroid."""

    def __init__(self, encoder: LinguisticEncoder, cmvn: Tensor, centroids: Tensor) -> None:
        self.encoder = encoder.eval()
        self.cmvn = cmvn
        self.centroids = centroids

    @torch.inference_mode()
    def encode(self, rows: Sequence[Tensor]) -> list[Codes]:
        """Trimmed 16 kHz rows (n,) to codes (n2,) int32 each; rows below 55 ms have none.

        Samples pass through 16-bit storage first, as in the published code.
        """
        codes: list[Codes] = [np.zeros(0, np.int32) for _ in rows]
        for group in _similar_lengths([len(row) for row in rows], shortest=STREAM_TAIL):
            lengths = torch.tensor([len(rows[index]) for index in group])
            samples = through_pcm16(pad_sequence([rows[index] for index in group], batch_first=True))
            counts = linguistic_frames(lengths)
            features = linguistic_features(samples.to(self.cmvn.device), lengths, self.cmvn)
            hidden = self.encoder(features, counts.to(features.device)).float()
            found = nearest(hidden, self.centroids).to(torch.int32).cpu().numpy()
            for row, index, count in zip(found, group, counts.tolist(), strict=True):
                codes[index] = row[:count]
        return codes


class SemanticTokenizer:
    """Recordings to semantic codes through an ONNX session, in pieces of 30 s."""

    def __init__(self, session: onnxruntime.InferenceSession, source: str) -> None:
        self.session = session
        self.source = source
        self.bins = int(session.get_inputs()[0].shape[1])
        self.takes_batches = BATCHED in session.get_modelmeta().custom_metadata_map  # the published file takes one row

    def encode(self, rows: Sequence[Tensor]) -> list[Codes]:
        """Trimmed 16 kHz rows (n,) to codes (n3,) int32 each. Pieces of less than 480 samples are dropped.

        Raises InvalidCheckpoint where the session's code count is more than two off 25 per second.
        """
        owners = [(index, piece) for index, row in enumerate(rows) for piece in torch.split(row, PIECE_SAMPLES)
                  if len(piece) >= SHORTEST_PIECE]  # fmt: skip
        found: list[Codes] = [np.zeros(0, np.int32) for _ in owners]
        for group in _similar_lengths([len(piece) for _, piece in owners]):
            for some in [group] if self.takes_batches else [[index] for index in group]:
                for index, codes in zip(some, self._run([owners[index][1] for index in some]), strict=True):
                    found[index] = codes
        return [
            np.concatenate([np.zeros(0, np.int32), *(codes for (owner, _), codes in zip(owners, found, strict=True)
                                                     if owner == index)])
            for index in range(len(rows))
        ]  # fmt: skip

    def _run(self, pieces: list[Tensor]) -> Iterator[Codes]:
        lengths = torch.tensor([len(piece) for piece in pieces])
        feats = whisper_log_mel(pad_sequence(pieces, batch_first=True), lengths, self.bins)
        frames = (lengths // 160).to(torch.int32)
        names = [wanted.name for wanted in self.session.get_inputs()]
        out = self.session.run(None, dict(zip(names, (feats.cpu().numpy(), frames.numpy()), strict=True)))[0]
        for row, length, count in zip(out.reshape(len(pieces), -1), lengths.tolist(), frames.tolist(), strict=True):
            codes = row.astype(np.int32)
            codes = codes[: -(-count // 4)] if len(pieces) > 1 else codes
            self._check(codes, round(length / RATE_HZ, 2))
            yield codes

    def _check(self, codes: Codes, duration_s: float) -> None:
        if abs(len(codes) - SEMANTIC_RATE_HZ * duration_s) > 2 or (codes.size and codes.max() >= SEMANTIC_SIZE):
            raise InvalidCheckpoint(f"{self.source} gave {len(codes)} codes (largest {codes.max(initial=0)}) for "
                                    f"{duration_s} s, where 25 per second below {SEMANTIC_SIZE} belong.",
                                    _REFETCH)  # fmt: skip


class SpeakerEmbedder:
    """Recordings to speaker embeddings through an ONNX session."""

    def __init__(self, session: onnxruntime.InferenceSession, source: str) -> None:
        self.session = session
        self.source = source

    def embed(self, rows: Sequence[Tensor]) -> list[npt.NDArray[np.float32]]:
        """16 kHz rows (n,) to embeddings (192,) each; rows below 25 ms are lengthened with silence to that."""
        return [self._run(row) for row in rows]

    def _run(self, row: Tensor) -> npt.NDArray[np.float32]:
        row = torch.nn.functional.pad(row, (0, max(0, 2 * FRAME_400 - len(row))))
        feats = speaker_fbank(row)[None].cpu().numpy()
        embedding: npt.NDArray[np.float32] = self.session.run(None, {self.session.get_inputs()[0].name: feats})[0]
        embedding = embedding.reshape(-1).astype(np.float32)
        if embedding.shape != (SPEAKER_SIZE,) or not np.isfinite(embedding).all():
            raise InvalidCheckpoint(f"{self.source} gave {embedding.shape} values, not {SPEAKER_SIZE} finite ones.",
                                    _REFETCH)  # fmt: skip
        return embedding


def load_linguistic(checkpoint: Checkpoint, *, device: str | torch.device = "cpu",
                    dtype: torch.dtype = torch.float32) -> LinguisticTokenizer:  # fmt: skip
    """The linguistic tokenizer. Raises MissingComponent or InvalidCheckpoint naming the file."""
    config_file = checkpoint.linguistic_dir / "config.yaml"
    try:
        config = LinguisticConfig.from_published(read_yaml(config_file))
        with unfilled():
            encoder = LinguisticEncoder(config)
    except MALFORMED as error:
        raise InvalidCheckpoint(f"{config_file} gives no sizes of an encoder ({error}).", _REFETCH) from error
    weights = read_weights(checkpoint.linguistic_file)
    state = {name.removeprefix("encoder."): tensor for name, tensor in weights.items() if name.startswith("encoder.")}
    try:
        encoder.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InvalidCheckpoint(f"{checkpoint.linguistic_file} does not fit {config_file} ({reason}).",
                                _REFETCH) from error  # fmt: skip
    cmvn = _read_cmvn(checkpoint.linguistic_cmvn_file, config.input_size)
    centroids = _read_centroids(checkpoint.centroids_file, config.output_size)
    return LinguisticTokenizer(encoder.requires_grad_(False).to(device, dtype), cmvn.to(device), centroids.to(device))


def load_semantic(checkpoint: Checkpoint, *, device: str = "cpu", threads: int = 0) -> SemanticTokenizer:
    """The semantic tokenizer; `threads` 0 lets onnxruntime choose. Raises MissingComponent or InvalidCheckpoint."""
    path = checkpoint.semantic_onnx
    session = _session(path, device, threads)
    shapes = [wanted.shape for wanted in session.get_inputs()]
    if len(shapes) != 2 or len(shapes[0]) != 3 or not isinstance(shapes[0][1], int):
        raise InvalidCheckpoint(f"{path} takes {shapes}, not features (1, bins, T) and their length.", _REFETCH)
    return SemanticTokenizer(session, str(path))


def load_speaker(checkpoint: Checkpoint, *, device: str = "cpu", threads: int = 0) -> SpeakerEmbedder:
    """The speaker encoder; `threads` 0 lets onnxruntime choose. Raises MissingComponent or InvalidCheckpoint."""
    path = checkpoint.speaker_onnx
    session = _session(path, device, threads)
    shapes = [wanted.shape for wanted in session.get_inputs()]
    if len(shapes) != 1 or len(shapes[0]) != 3:
        raise InvalidCheckpoint(f"{path} takes {shapes}, not features (B, T, 80).", _REFETCH)
    return SpeakerEmbedder(session, str(path))


def load_mel_config(checkpoint: Checkpoint) -> MelConfig:
    """Sizes of the prompt mel from cosyvoice.yaml. Raises MissingComponent or InvalidCheckpoint."""
    names = [field.name for field in fields(MelConfig)]
    try:
        document = read_config(checkpoint)["mel_conf"]
        return MelConfig(**{name: type(getattr(MelConfig, name))(document[name]) for name in names})
    except MALFORMED as error:
        raise InvalidCheckpoint(f"{checkpoint.cosyvoice_yaml} gives no sizes of a mel ({error}).", _REFETCH) from error


def _session(path: Path, device: str, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
    providers = [name for name in [*wanted, "CPUExecutionProvider"] if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(path, sess_options=options, providers=providers)
    except Exception as error:  # onnxruntime's own exceptions share no base class
        reason = " ".join(str(error).split())[:200]
        raise InvalidCheckpoint(f"{path} is not a model that onnxruntime can run ({reason}).", _REFETCH) from error


def _read_cmvn(path: Path, size: int) -> Tensor:
    """Shift and scale, (2, size), from Kaldi's text form of the feature statistics."""
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = [re.search(rf"<{part}>[^<]*<LearnRateCoef>[^\[]*\[([^\]]*)\]", text) for part in ("AddShift", "Rescale")]
    try:
        values = [[float(value) for value in row[1].split()] if row else [] for row in rows]
    except ValueError as error:
        raise InvalidCheckpoint(f"{path} holds something that is no number ({error}).", _REFETCH) from error
    if any(len(row) != size for row in values):
        raise InvalidCheckpoint(f"{path} holds {[len(row) for row in values]} values of shift and scale, not {size} "
                                "each.", _REFETCH)  # fmt: skip
    return torch.tensor(values, dtype=torch.float32)


def _read_centroids(path: Path, size: int) -> Tensor:
    try:
        table: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidCheckpoint(f"{path} is not an array ({error}).", _REFETCH) from error
    if table.shape != (LINGUISTIC_SIZE, size) or not np.issubdtype(table.dtype, np.floating):
        raise InvalidCheckpoint(f"{path} holds {table.dtype} {table.shape}, not floats ({LINGUISTIC_SIZE}, {size}).",
                                _REFETCH)  # fmt: skip
    return torch.from_numpy(table.astype(np.float32))


def _similar_lengths(lengths: Sequence[int], shortest: int = 1, spread: float = 2.0) -> Iterator[list[int]]:
    """Indices of rows of at least `shortest`, in groups whose longest is at most `spread` times their shortest."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if lengths[index] < shortest:
            continue
        if group and lengths[index] > spread * lengths[group[0]]:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
