"""The reward model as a served unit: a prompt and an answer in, a score per audio token and their aggregate out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from services.reward.settings import RewardSettings
from shared.checkpoints.layout import Checkpoint
from shared.checkpoints.reward import load_reward, reward_folder
from shared.checkpoints.step1 import load_text_tokenizer
from shared.errors import UserError
from shared.inference.port import InferenceRequest, Tensors
from shared.settings import from_environment

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


class RewardModel:
    """The model "reward".

    Inputs "prompt" int64 (n,), a chat of shared.prompts that opens the assistant's turn, and "mixed" int (m,), the
    answer's audio tokens. Outputs "scores" float32 (m,), one per token, and "score" float32 (), their aggregate.
    """

    name = "reward"

    def __init__(
        self, checkpoint: Checkpoint, *, device: str | None = None, settings: RewardSettings | None = None
    ) -> None:
        """Load the checkpoint's reward model; MissingComponent where it has none. `device` overrules the settings'."""
        self._settings = settings or from_environment(RewardSettings)
        chosen = device or self._settings.device
        self.model, self.aggregate = load_reward(checkpoint, dtype=DTYPES[self._settings.dtype], device=chosen)
        self._tokenizer = load_text_tokenizer(Checkpoint(reward_folder(checkpoint)))

    @torch.inference_mode()
    def infer(self, requests: Sequence[InferenceRequest]) -> list[Tensors | Exception]:
        """Score each request; the valid ones run as one padded batch."""
        answers: list[Tensors | Exception] = []
        chats: list[tuple[int, np.ndarray, int]] = []
        for place, request in enumerate(requests):
            try:
                ids, start = self._ids(request)
                chats.append((place, ids, start))
                answers.append({})
            except UserError as error:
                answers.append(error)
        if chats:
            batch = torch.zeros(len(chats), max(len(ids) for _, ids, _ in chats), dtype=torch.long)
            for row, (_, ids, _) in enumerate(chats):
                batch[row, : len(ids)] = torch.from_numpy(ids)
            scores = self.model(batch.to(self.model.trunk.device)).float().cpu().numpy()
            for row, (place, ids, start) in enumerate(chats):
                own = scores[row, start : len(ids)]
                answers[place] = {"scores": own, "score": np.array(aggregate(own, self.aggregate), np.float32)}
        return answers

    def _ids(self, request: InferenceRequest) -> tuple[np.ndarray, int]:
        prompt = np.asarray(request.inputs["prompt"], np.int64).reshape(-1)
        mixed = np.asarray(request.inputs["mixed"]).reshape(-1)
        if not len(prompt) or not len(mixed):
            raise UserError("The prompt or the answer to be scored is empty.", code="invalid_prompt")
        vocabulary = self.model.trunk.config.vocab_size
        if prompt.min() < 0 or prompt.max() >= vocabulary:
            raise UserError(f"The prompt holds an id outside 0..{vocabulary - 1}.",
                            "Encode it with the text tokenizer of the same checkpoint.", "invalid_prompt")  # fmt: skip
        if len(prompt) + len(mixed) > self._settings.max_tokens:
            raise UserError(f"{len(prompt) + len(mixed)} tokens are more than {self._settings.max_tokens}.",
                            "Score a shorter one, or raise EDITX_REWARD_MAX_TOKENS.", "prompt_too_long")  # fmt: skip
        return np.concatenate([prompt, self._tokenizer.audio_ids(mixed)]), len(prompt)


def aggregate(scores: np.ndarray, how: str) -> float:
    """One score of the scores of all tokens, as the model was trained: their "mean", "sum" or the "last"."""
    if how == "last":
        return float(scores[-1])
    return float(scores.sum() if how == "sum" else scores.mean())
