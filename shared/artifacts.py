"""The binary artifacts that steps hand to each other: tensors and a few numbers in one safetensors blob.

Each blob says in its metadata what it is and which version of the layout it has. Knows nothing about stores or keys.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from shared.codes import Codes, interleave
from shared.errors import PoisonError

VERSION = 1
METADATA_KEY = "editx"  # one key, since safetensors writes several in no fixed order
SPEAKER_SIZE = 192
MEL_BINS = 80

Arrays = dict[str, npt.NDArray[Any]]


def _pack(kind: str, arrays: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, object]) -> bytes:
    document = json.dumps({"kind": kind, "version": VERSION, "facts": facts}, sort_keys=True)
    return bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, {METADATA_KEY: document}))


def _unpack(kind: str, blob: bytes) -> tuple[Arrays, dict[str, Any]]:
    try:
        header_size = int.from_bytes(blob[:8], "little")
        document = json.loads(json.loads(blob[8 : 8 + header_size])["__metadata__"][METADATA_KEY])
        found, version, facts = str(document["kind"]), int(document["version"]), dict(document["facts"])
        arrays = dict(load(blob))
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise PoisonError(f"{kind} artifact: {len(blob)} bytes that are not one ({error}).",
                          "It was cut short or written by something else; run the step again.") from error  # fmt: skip
    if found != kind or version > VERSION:
        raise PoisonError(f"{kind} artifact: found {found} version {version}, this release reads version {VERSION}.",
                          "Route the job to a worker of the release that wrote it.")  # fmt: skip
    return arrays, facts


def _as(kind: str, arrays: Arrays, name: str, dtype: type[np.generic], shape: tuple[int | None, ...]) -> Any:
    if name not in arrays:
        raise PoisonError(f"{kind} artifact: no {name} in it.", "Run the step that writes it again.")
    array = arrays[name]
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if array.dtype != dtype or not fits:
        raise PoisonError(f"{kind} artifact: {name} is {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}.",
                          "Run the step that writes it again.")  # fmt: skip
    return array


def _fact(kind: str, facts: dict[str, Any], name: str, types: tuple[type, ...]) -> Any:
    if not isinstance(facts.get(name, ...), types):
        raise PoisonError(f"{kind} artifact: {name} is {facts.get(name, 'not in it')!r}.",
                          "Run the step that writes it again.")  # fmt: skip
    return facts[name]


@dataclass(frozen=True, eq=False)
class Tokenized:
    """What the tokenizer makes of a recording.

    linguistic (n2,) and semantic (n3,) codes, speaker_embedding (192,), prompt_mel (frames, 80) log mel at 50 frames/s,
    duration_s of the recording as it came.
    """

    linguistic: Codes
    semantic: Codes
    speaker_embedding: npt.NDArray[np.float32]
    prompt_mel: npt.NDArray[np.float32]
    duration_s: float

    @property
    def mixed(self) -> Codes:
        """The interleaved audio tokens, (groups * 5,)."""
        return interleave(self.linguistic, self.semantic)

    def to_bytes(self) -> bytes:
        """The artifact as one blob."""
        arrays = {
            "linguistic": self.linguistic.astype(np.int32),
            "semantic": self.semantic.astype(np.int32),
            "speaker_embedding": self.speaker_embedding.astype(np.float32),
            "prompt_mel": self.prompt_mel.astype(np.float32),
        }
        return _pack("tokenized", arrays, {"duration_s": self.duration_s})

    @classmethod
    def from_bytes(cls, blob: bytes) -> "Tokenized":
        """The artifact in a blob; PoisonError where it is not one."""
        arrays, facts = _unpack("tokenized", blob)
        return cls(
            linguistic=_as("tokenized", arrays, "linguistic", np.int32, (None,)),
            semantic=_as("tokenized", arrays, "semantic", np.int32, (None,)),
            speaker_embedding=_as("tokenized", arrays, "speaker_embedding", np.float32, (SPEAKER_SIZE,)),
            prompt_mel=_as("tokenized", arrays, "prompt_mel", np.float32, (None, MEL_BINS)),
            duration_s=float(_fact("tokenized", facts, "duration_s", (int, float))),
        )


@dataclass(frozen=True, eq=False)
class Generated:
    """What the language model wrote.

    mixed (groups * 5,) audio tokens; the seed that gives them again; attempts made; seconds of audio; whether the last
    attempt still collapsed into a loop; the reward model's score where one was asked for; how much slower than its
    tokens it should be said.
    """

    mixed: Codes
    seed: int
    attempts: int
    seconds: float
    collapsed: bool
    score: float | None = None
    stretch: float = 1.0

    def to_bytes(self) -> bytes:
        """The artifact as one blob."""
        facts = {"seed": self.seed, "attempts": self.attempts, "seconds": self.seconds, "collapsed": self.collapsed,
                 "score": self.score, "stretch": self.stretch}  # fmt: skip
        return _pack("generated", {"mixed": self.mixed.astype(np.int32)}, facts)

    @classmethod
    def from_bytes(cls, blob: bytes) -> "Generated":
        """The artifact in a blob; PoisonError where it is not one."""
        arrays, facts = _unpack("generated", blob)
        score = _fact("generated", facts, "score", (int, float, type(None)))
        facts.setdefault("stretch", 1.0)  # of a step that ran before there was one
        return cls(
            mixed=_as("generated", arrays, "mixed", np.int32, (None,)),
            seed=_fact("generated", facts, "seed", (int,)),
            attempts=_fact("generated", facts, "attempts", (int,)),
            seconds=float(_fact("generated", facts, "seconds", (int, float))),
            collapsed=_fact("generated", facts, "collapsed", (bool,)),
            score=None if score is None else float(score),
            stretch=float(_fact("generated", facts, "stretch", (int, float))),
        )
