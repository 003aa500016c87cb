"""The generate step: an instruction and the recording's codes in, new audio tokens out.

Knows no bus, store or server.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from services.llm.sampling import MEL_FRAMES_PER_GROUP, audible_share, length_bounds, outside_pauses
from shared.artifacts import Generated, Tokenized
from shared.codes import GROUP, GROUP_S, Codes
from shared.errors import PermanentError
from shared.inference.port import Inference, Parameters, Tensors, given
from shared.prompts import Turn, edit_turns
from shared.schemas.edit import Edit
from shared.schemas.request import SEED_MAX
from shared.schemas.route import GENERATED, StepKind, candidate
from shared.steps import StepContext

MODEL = "llm"
SAMPLING = ("temperature", "top_p", "top_k", "repetition_window", "repetition_ratio")
SEED_STRIDE = 1_000_003

Encode = Callable[[Sequence[Turn]], Sequence[int]]


def _plain(edit: Edit) -> Edit | None:
    """What an edit of the manner should not end up as: the same said plainly."""
    is_manner = edit.type in ("emotion", "style", "speed") and edit.detail != "remove"
    return Edit(type="emotion", detail="remove") if is_manner else None


def _code_points(text: str) -> npt.NDArray[np.int32]:
    """A text as a tensor of the model, (k,)."""
    return np.array([ord(character) for character in text], np.int32)


def _without_pauses(mixed: Codes, mel: npt.NDArray[np.float32]) -> Codes:
    """A recording's audio tokens without its pauses, as far as its mel tells them.

    The published front end cuts the ends of the tokens and not those of the mel, which are then left as they are.
    """
    groups = len(mixed) // GROUP
    if abs(len(mel) / MEL_FRAMES_PER_GROUP - groups) > 1:
        return mixed
    return mixed[: groups * GROUP].reshape(groups, GROUP)[outside_pauses(mel, groups)].reshape(-1)


class GenerateHandler:
    """Builds the prompt of an edit and has the language model write audio tokens, as several candidates if asked."""

    kind: StepKind = "generate"

    def __init__(self, inference: Inference, encode: Encode) -> None:
        self._inference = inference
        self._encode = encode

    def run(self, step: StepContext) -> None:
        """Raises UserError for texts and tags that cannot be used."""
        parameters = step.step.parameters
        edit, source = Edit.model_validate(parameters["edit"]), Tokenized.from_bytes(step.read("tokens"))
        mixed, audible, limits = source.mixed, 0.0, dict[str, Any]()
        if edit.type == "vad":
            whole, mixed = len(mixed), _without_pauses(mixed, source.prompt_mel)
            audible = audible_share(source.prompt_mel) * whole / max(1, len(mixed))
            limits["ends_full"] = 1  # a whole copy is as long as it may be
        inputs: dict[str, np.ndarray[Any, Any]] = {"prompt": self._prompt(edit, parameters["text"], mixed)}
        step.progress(0.05, "writing audio tokens")
        count, groups, longest_s = int(parameters["n_best"]), len(mixed) // GROUP, parameters["max_duration_s"]
        limits["min_groups"], limits["max_groups"] = length_bounds(
            edit, groups, parameters["text"], audible=audible, max_duration_s=longest_s
        )
        began = time.perf_counter()
        seeds = [(int(parameters["seed"]) + number * SEED_STRIDE) % (SEED_MAX + 1) for number in range(count)]
        said = edit.target_text or parameters["text"] or ""
        if said:
            inputs["text"] = _code_points(said)
        plain = _plain(edit)
        if plain or not said:
            inputs["spoken"] = mixed[: groups * GROUP]
        if plain:
            inputs["against"] = self._prompt(plain, parameters["text"], mixed)
            inputs["manner"] = _code_points(f"{edit.type}/{edit.detail}")
        found = self._generate_all(step, inputs, seeds, limits)
        names = [GENERATED] if count == 1 else [candidate(number) for number in range(count)]
        for name, generated in zip(names, found, strict=True):
            step.write(name, generated.to_bytes())
        seconds = sum(generated.seconds for generated in found)
        step.measure("audio_s", seconds)
        step.measure("tokens", sum(len(generated.mixed) for generated in found))
        step.measure("draws", sum(generated.attempts for generated in found))
        step.measure("collapsed", sum(generated.collapsed for generated in found))
        step.measure("rtf", (time.perf_counter() - began) / seconds)

    def _prompt(self, edit: Edit, text: str | None, mixed: Codes) -> npt.NDArray[np.int64]:
        """The chat that asks for an edit of a recording, as ids (n,)."""
        return np.asarray(self._encode(edit_turns(edit, text, mixed)), np.int64)

    def _generate_all(
        self, step: StepContext, inputs: Tensors, seeds: list[int], limits: Parameters
    ) -> list[Generated]:
        """One candidate per seed, side by side so that they share a batch."""
        if len(seeds) == 1:
            return [self._generate(step, inputs, seeds[0], limits)]
        with ThreadPoolExecutor(len(seeds)) as pool:
            contexts = [contextvars.copy_context() for _ in seeds]  # the trace goes along
            calls = [pool.submit(context.run, self._generate, step, inputs, seed, limits)
                     for context, seed in zip(contexts, seeds, strict=True)]  # fmt: skip
            return [call.result() for call in calls]

    def _generate(self, step: StepContext, inputs: Tensors, seed: int, limits: Parameters) -> Generated:
        parameters = given(**{name: step.step.parameters[name] for name in SAMPLING})
        answer = self._inference.infer(
            MODEL,
            inputs,
            parameters={**parameters, **limits, "seed": seed},
            deadline=step.deadline,
            cancelled=step.cancelled,
            priority=step.priority,
        )
        mixed = answer["mixed"].astype(np.int32)
        if len(mixed) < GROUP:
            raise PermanentError("The language model wrote no audio.", "Try another seed.", "no_audio_generated")
        seconds = len(mixed) // GROUP * GROUP_S
        stretch, longest_s = float(answer["stretch"].reshape(-1)[0]), step.step.parameters["max_duration_s"]
        if longest_s is not None:
            stretch = min(stretch, max(1.0, float(longest_s) / seconds))
        return Generated(
            mixed=mixed,
            seed=seed,
            attempts=int(answer["attempts"].reshape(-1)[0]),
            seconds=seconds * stretch,
            collapsed=bool(answer["collapsed"].reshape(-1)[0]),
            stretch=stretch,
        )
