"""Train the flow's encoder on to be understood: `python -m services.trainer.recipes.nano.heard`.

The mean of all mels that a code may stand for lies nearest to the true one and is hard to understand. Here Whisper's
encoder, which taught the tokenizers what the codes mean, hears the rough mel beside the true one; the distance between
what it makes of them is trained down, beside the distance of the mels (a perceptual loss, arXiv 1603.08155). It hears
our mels as they are: its own bins are nearly a linear function of ours. The estimator, whose mels would gain in
naturalness and lose in words, stays as it is. Starts from `flow`, which it leaves alone. Needs what `flow` does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor

from services.trainer.recipes.nano import flow as flows
from services.trainer.recipes.nano.codes import Coded
from services.trainer.recipes.nano.run import Optimizer, Run, begin, cosine, products, set_lr, training_options
from services.trainer.recipes.nano.teacher import SAMPLE_RATE_HZ
from services.trainer.recipes.nano.whisper import HIDDEN, WhisperEncoder
from shared.audio.features import MelConfig, prompt_mel, whisper_log_mel
from shared.models.flow.cfm import masked_error
from shared.models.flow.flow import first_places

BINS = MelConfig().num_mels
FITTED_ON = 300
"""Readings."""
SILENCE = float(np.log(1e-5))
"""The least value of our mels."""
DEEPEST = 8.0
"""Whisper hears nothing that is so far below the loudest, in powers of ten."""


@dataclass(frozen=True)
class HeardRecipe:
    flow: flows.FlowRecipe
    weight: float = 2.0
    """Of what is heard beside the distance of the mels."""


CPU = HeardRecipe(
    flows.FlowRecipe(steps=1500, batch=12, groups=20, lr=3e-4, final_lr=1.5e-5, average=0.99, cheap=0.3, replaced=0.03)
)
GPU = HeardRecipe(replace(CPU.flow, steps=4000, batch=64, groups=40, average=0.998))


class BinMap:
    """Our log mels (natural logarithm of the magnitude, 50 Hz) to Whisper's (powers of ten, 100 Hz), fitted by least
    squares: two of its frames from three of ours."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights  # (3 * BINS + 1, 2 * BINS)

    @classmethod
    def fit(cls, pairs: list[tuple[Tensor, Tensor]], ridge: float = 1.0) -> BinMap:
        """From pairs of our mel (T, 80) and Whisper's in powers of ten (80, 2T)."""
        size = 3 * BINS + 1
        gram, product = (torch.zeros(size, width, dtype=torch.float64) for width in (size, 2 * BINS))
        for ours, theirs in pairs:
            known = cls._neighbours(ours[None])[0].double()
            gram += known.T @ known
            product += known.T @ theirs.T.reshape(len(ours), -1).double()
        return cls(torch.linalg.solve(gram + ridge * torch.eye(size, dtype=torch.float64), product).float())

    @staticmethod
    def _neighbours(mel: Tensor) -> Tensor:
        """(B, T, 80) -> (B, T, 241): the frame before, itself, the frame after, one."""
        padded = F.pad(mel.transpose(1, 2), (1, 1), mode="replicate").transpose(1, 2)
        return torch.cat([padded[:, :-2], mel, padded[:, 2:], torch.ones_like(mel[..., :1])], -1)

    def __call__(self, mel: Tensor) -> Tensor:
        """(B, T, 80) -> (B, 80, 2T)."""
        both = self._neighbours(mel.float()) @ self._weights.to(mel.device)
        return both.reshape(len(mel), -1, BINS).transpose(1, 2)


class Listener:
    """What Whisper's encoder makes of mels."""

    def __init__(self, encoder: WhisperEncoder, bins: BinMap) -> None:
        self._encoder, self._bins = encoder, bins

    @classmethod
    def of_readings(cls, coded: Coded, device: torch.device) -> Listener:
        """With bins fitted on readings of the corpus."""
        chosen = np.random.default_rng(0).permutation(len(coded))[:FITTED_ON]
        pairs = []
        for position in chosen:
            audio = coded.store.audio(coded.position[coded.items[position]["row"]["index"]]).astype(np.float32)
            at_16k = np.asarray(soxr.resample(audio, SAMPLE_RATE_HZ, 16_000), np.float32)
            ours, theirs = prompt_mel(torch.from_numpy(audio)), whisper_log_mel(torch.from_numpy(at_16k), bins=BINS)
            frames = min(len(ours), theirs.shape[1] // 2)
            pairs.append((ours[:frames], theirs[:, : 2 * frames] * 4 - 4))
        return cls(WhisperEncoder.of_assets(str(device), torch.float32), BinMap.fit(pairs))

    def _states(self, log: Tensor, loudest: Tensor) -> Tensor:
        """Whisper's bins (B, 80, 2T), heard as loud as something whose loudest value is given: states of its middle
        and of its last layer, each of one scale, (B, T, 1024)."""
        heard = self._encoder.states((torch.maximum(log, loudest - DEEPEST) + 4) / 4)
        return torch.cat([F.layer_norm(states, (HIDDEN,)) for states in heard], -1)

    def distance(self, mel: Tensor, true: Tensor, real: Tensor) -> Tensor:
        """Mean squared difference of the states, of the two layers together; mels (B, T, 80), of which the frames
        `real` (B, T) are heard -> scalar with gradients to `mel`."""
        mel, true = (torch.where(real[..., None], one, SILENCE) for one in (mel, true))
        with torch.no_grad():
            log = self._bins(true)
            loudest = log.amax((1, 2), keepdim=True)
            wanted = self._states(log, loudest)
        errors = (self._states(self._bins(mel), loudest) - wanted).square().mean(-1)
        return 2 * (errors * real).sum() / real.sum().clamp(min=1)


def main() -> None:
    arguments = training_options(__doc__).parse_args()
    device, recipe = begin(arguments, CPU, GPU)
    torch.manual_seed(11)
    flow = flows.averaged("flow").to(device).train()
    flow.decoder.requires_grad_(False)
    flow.spk_embed_affine_layer.requires_grad_(False)
    average = torch.optim.swa_utils.AveragedModel(flow, multi_avg_fn=flows.averaging(recipe.flow.average))
    optimizer = Optimizer(flow, recipe.flow.lr, outside=("embedding",))
    parts = {"model": flow, "average": average, "optimizers": optimizer}
    run = Run("heard", parts, arguments.steps or recipe.flow.steps, arguments.minutes)
    batches = flows.Batches.of_data(recipe.flow)
    listener = Listener.of_readings(batches.coded, device)
    while run.going:
        pairs, lengths, mel, mel_lengths, _ = (x.to(device) for x in batches.draw(run.rng()))
        set_lr(optimizer, cosine(run.step, run.steps, recipe.flow.lr, recipe.flow.final_lr, warmup=30))
        with products(device):
            rough = flow.encode(pairs, lengths)
            real = first_places(torch.minimum(flow.frames_per_token * lengths, mel_lengths), rough.shape[1])
            prior = masked_error(rough, mel, real, flows.DIALS.norm)
            heard = listener.distance(rough, mel, real)
        optimizer.zero_grad()
        (prior + recipe.weight * heard).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 2.0)
        optimizer.step()
        average.update_parameters(flow)
        run.done_step({"prior": prior.detach(), "heard": heard.detach()})


if __name__ == "__main__":
    main()
