"""Train the flow: codes, a piece of reference mel and a speaker vector to a mel. `python -m
services.trainer.recipes.nano.flow`.

The encoder's rough mel is trained by regression beside the flow matching (as in Grad-TTS, arXiv 2105.06337), which
at this size is what makes it converge in hours of CPU; the code embeddings start from the tokenizers' own
centroids. Half of the excerpts are the cheap readings of `mels`, a quarter the teacher's at other speeds
(`perturbed`), and some have a breath, a sigh, an "um" or a laugh in them (`sounds`): without those a breath's codes
are decoded to silence. Some codes of the input are other ones, as those of voices that the tokenizers never heard will
be. Needs `codes`, `perturbed`, `mels` and `sounds`.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import soxr
import torch
from torch import Tensor

from services.trainer.recipes.nano import linguistic, mels, perturbed, semantic, sounds
from services.trainer.recipes.nano.codes import Coded, Item, other_codes
from services.trainer.recipes.nano.run import (
    Optimizer,
    Run,
    begin,
    cosine,
    count_parameters,
    products,
    set_lr,
    trained,
    training_options,
)
from services.trainer.recipes.nano.teacher import SAMPLE_RATE_HZ
from shared.audio.features import prompt_mel
from shared.codes import LINGUISTIC_PAD, interleave, time_align
from shared.models.flow import Flow, FlowConfig
from shared.models.flow.cfm import FlowTraining

SECTION: dict[str, Any] = {
    "input_size": 256,
    "output_size": 80,
    "spk_embed_dim": 192,
    "vocab_size": 5121,
    "longest_reference": 60,
    "voiced_rough": True,
    "encoder": {
        "input_size": 256, "output_size": 256, "pre_lookahead_len": 3, "num_blocks": 3, "num_up_blocks": 2,
        "up_stride": 2, "up_scale_factor": 2, "attention_heads": 4, "key_bias": True, "linear_units": 768,
        "normalize_before": True, "dropout_rate": 0.05,
    },
    "decoder": {
        "inference_cfg_rate": 1.6,
        "rough_guidance": {"width": 7.0, "until": 0.8},
        "estimator": {
            "in_channels": 320, "out_channels": 80, "mlp_ratio": 3.0, "depth": 6, "num_heads": 4, "head_dim": 56,
            "hidden_size": 224,
        },
    },
}  # fmt: skip
"""The `flow` section of the small checkpoint's cosyvoice.yaml."""


@dataclass(frozen=True)
class FlowRecipe:
    steps: int
    batch: int
    groups: int = 32
    """Length of a training excerpt in groups of 120 ms."""
    lr: float = 1e-3
    final_lr: float = 5e-5
    average: float = 0.998
    """Of the exponential average of the weights, which is what the checkpoint gets."""
    cheap: float = 0.5
    """Share of the excerpts by virtual speakers of `mels`."""
    perturbed: float = 0.25
    """Share of the excerpts by the teacher at another speed."""
    sounding: float = 0.08
    """Share of the excerpts with a sound between two words."""
    replaced: float = 0.05
    """Share of the tokens that are others of their kind."""


CPU = FlowRecipe(steps=4000, batch=12, groups=20)
GPU = FlowRecipe(steps=16_000, batch=96, groups=40, average=0.9995)
Tensors = tuple[Tensor, ...] | list[Tensor]
DIALS = FlowTraining(prompt_rate=0.7, prompt_max_share=0.5, prior_weight=1.0)


def averaging(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """An exponential average whose window grows with the run, so that the first weights are soon forgotten."""

    @torch.no_grad()
    def update(averages: Tensors, weights: Tensors, count: Tensor | int) -> None:
        kept = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averages, weights, 1 - kept)

    return update


def averaged(name: str) -> Flow:
    """The flow with the averaged weights of a run. Raises SystemExit where the run is missing."""
    flow = Flow(FlowConfig.from_dict(SECTION))
    average = torch.optim.swa_utils.AveragedModel(flow)
    trained(name, "average", average)
    flow.load_state_dict(average.module.state_dict())
    return flow


def start_embedding(flow: Flow) -> None:
    """Copy the centroids, projected onto their principal directions and scaled, into the code table."""
    student, autoencoder = linguistic.Student(), semantic.Autoencoder(linguistic.CONFIG.output_size)
    Run("linguistic", {"model": student}, 0)
    Run("semantic", {"model": autoencoder}, 0)
    table = flow.input_embedding.embedding.weight
    with torch.no_grad():
        for centroids, first in ((student.codebook.centroids, 0), (autoencoder.codebook.centroids, 1025)):
            centred = centroids - centroids.mean(0)
            directions = torch.linalg.svd(centred, full_matrices=False).Vh[: table.shape[1]]
            projected = centred @ directions.T
            table[first : first + len(centroids)] *= 0.1
            table[first : first + len(centroids), : projected.shape[1]] += projected / projected.std()


class Batches:
    """Excerpts on the grid of groups: token pairs, mel, speaker vector."""

    def __init__(
        self, coded: Coded, at_speeds: list[Item], cheap: list[Item], sounding: list[Item], recipe: FlowRecipe
    ) -> None:
        self.coded, self.at_speeds, self.cheap, self.sounding, self.recipe = coded, at_speeds, cheap, sounding, recipe
        self._mels: dict[tuple[int, float], np.ndarray] = {}

    @classmethod
    def of_data(cls, recipe: FlowRecipe) -> Batches:
        """Of all readings that the steps before left, told on the terminal."""
        batches = cls(Coded(), list(perturbed.items()), list(mels.items()), list(sounds.items()), recipe)
        rows: dict[str, Sized] = {
            "of the corpus": batches.coded, "at other speeds": batches.at_speeds, "with sounds": batches.sounding,
            "cheap": batches.cheap,
        }  # fmt: skip
        print("rows: " + ", ".join(f"{len(items)} {name}" for name, items in rows.items()), flush=True)
        return batches

    def mel(self, row: dict[str, Any]) -> np.ndarray:
        """(frames, 80) of a row of the store at its speed, kept in float16."""
        index, speed = row["index"], row.get("speed", 1.0)
        if (index, speed) not in self._mels:
            audio = self.coded.store.audio(self.coded.position[index])
            if speed != 1.0:
                audio = np.asarray(soxr.resample(audio, SAMPLE_RATE_HZ * speed, SAMPLE_RATE_HZ), np.float32)
            self._mels[index, speed] = prompt_mel(torch.from_numpy(audio)).numpy().astype(np.float16)
        return self._mels[index, speed]

    def _item(self, rng: np.random.Generator) -> tuple[Item, np.ndarray]:
        """A reading and its mel (frames, 80)."""
        kind = rng.random()
        ready = self.cheap if kind < self.recipe.cheap else []
        if self.sounding and rng.random() < self.recipe.sounding:
            ready = self.sounding
        if ready:
            item = ready[int(rng.integers(len(ready)))]
            return item, item["mel"]
        teachers = self.at_speeds if self.at_speeds and kind > 1 - self.recipe.perturbed else self.coded.items
        item = teachers[int(rng.integers(len(teachers)))]
        return item, self.mel(item["row"])

    def _others(self, pairs: Tensor, rng: np.random.Generator) -> Tensor:
        """The pairs (T, 2) with a share of their codes replaced by codes of the same kind."""
        others = other_codes(len(pairs), rng)
        chosen = torch.from_numpy(rng.random(pairs.shape) < self.recipe.replaced) & (pairs != LINGUISTIC_PAD)
        return torch.where(chosen, others, pairs)

    def draw(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Pairs (B, 3G, 2), their lengths, mel (B, 6G, 80), its lengths, speaker (B, 192)."""
        recipe = self.recipe
        pairs = torch.zeros(recipe.batch, 3 * recipe.groups, 2, dtype=torch.long)
        mels = torch.zeros(recipe.batch, 6 * recipe.groups, 80)
        lengths, mel_lengths, speakers = [], [], []
        for b in range(recipe.batch):
            item, mel = self._item(rng)
            aligned = self._others(time_align(torch.from_numpy(interleave(*item["clean"]).astype(np.int64))), rng)
            groups = min(len(aligned) // 3, len(mel) // 6)
            first = int(rng.integers(max(1, groups - recipe.groups + 1)))
            taken = min(groups - first, recipe.groups)
            pairs[b, : 3 * taken] = aligned[3 * first : 3 * (first + taken)]
            mels[b, : 6 * taken] = torch.from_numpy(mel[6 * first : 6 * (first + taken)].astype(np.float32))
            lengths.append(3 * taken)
            mel_lengths.append(6 * taken)
            speakers.append(item["speaker"])
        return pairs, torch.tensor(lengths), mels, torch.tensor(mel_lengths), torch.from_numpy(np.stack(speakers))


def main() -> None:
    parser = training_options(__doc__)
    parser.add_argument("--groups", type=int, help="longer excerpts, as many fewer of them: for longer references")
    arguments = parser.parse_args()
    device, recipe = begin(arguments, CPU, GPU)
    if arguments.groups:
        recipe = replace(
            recipe, groups=arguments.groups, batch=max(1, recipe.batch * recipe.groups // arguments.groups)
        )
    torch.manual_seed(5)
    flow = Flow(FlowConfig.from_dict(SECTION))
    start_embedding(flow)
    flow.to(device)
    average = torch.optim.swa_utils.AveragedModel(flow, multi_avg_fn=averaging(recipe.average))
    optimizer = Optimizer(flow, recipe.lr, outside=("embedding",))
    parts = {"model": flow, "average": average, "optimizers": optimizer}
    run = Run("flow", parts, arguments.steps or recipe.steps, arguments.minutes)
    print(f"flow: {count_parameters(flow):.2f} M parameters, on {device}", flush=True)
    batches = Batches.of_data(recipe)
    while run.going:
        pairs, lengths, mel, mel_lengths, speaker = (x.to(device) for x in batches.draw(run.rng()))
        set_lr(optimizer, cosine(run.step, run.steps, recipe.lr, recipe.final_lr, warmup=200))
        with products(device):
            loss = flow.loss(pairs, lengths, mel, mel_lengths, speaker, dials=DIALS)
        optimizer.zero_grad()
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 2.0)
        optimizer.step()
        average.update_parameters(flow)
        run.done_step({"cfm": loss.cfm.detach(), "prior": loss.prior.detach()})


if __name__ == "__main__":
    main()
