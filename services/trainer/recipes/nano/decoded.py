"""Mels as the flow makes them of the corpus's own codes, for the vocoder: what it will be given in use.

They run along the recording frame by frame, so the recording's waveform is what the vocoder should make of them.
`python -m services.trainer.recipes.nano.decoded`, after `features` and `flow`; shards that are there are left.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence

import numpy as np
import soxr
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from services.trainer.recipes.nano import assets
from services.trainer.recipes.nano.codes import ReleasedTokenizers, Tokenizers, open_tokenizers
from services.trainer.recipes.nano.features import Store
from services.trainer.recipes.nano.flow import SECTION
from services.trainer.recipes.nano.run import Run, pick_device, products
from services.trainer.recipes.nano.teacher import SAMPLE_RATE_HZ
from shared.audio.features import prompt_mel
from shared.codes import interleave, time_align
from shared.models.flow import Flow, FlowConfig, flow_noise

BATCH = 8


def mels() -> dict[int, np.ndarray]:
    """What was written so far: (frames, 80) float16 by the row's index."""
    found: dict[int, np.ndarray] = {}
    for file in sorted((assets.data_dir() / "decoded").glob("shard-?????.npz")):
        data = dict(np.load(file))
        parts = np.split(data["mel"], np.cumsum(data["lengths"])[:-1])
        found |= dict(zip(data["index"].tolist(), parts, strict=True))
    return found


def trained_flow(device: torch.device) -> Flow:
    """The averaged weights of the flow's run. Raises SystemExit where there is none."""
    average = torch.optim.swa_utils.AveragedModel(Flow(FlowConfig.from_dict(SECTION)))
    if Run("flow", {"average": average}, 0).step == 0:
        raise SystemExit("train the flow first: python -m services.trainer.recipes.nano.flow")
    assert isinstance(average.module, Flow)
    return average.module.to(device).eval()


class Decoder:
    """Recordings to the mels that the flow makes of their codes, each with its own beginning as the reference."""

    def __init__(
        self, flow: Flow, tokenizers: Tokenizers | ReleasedTokenizers, steps: int, device: torch.device
    ) -> None:
        self._flow, self._tokenizers, self._steps, self._device = flow, tokenizers, steps, device

    def __call__(self, audios: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
        """24 kHz recordings (n,) to mels (frames, 80) float16."""
        read = [self._read(audio) for audio in audios]
        pairs, mels, speakers = zip(*read, strict=True)
        flow, device = self._flow, self._device
        longest = flow.config.longest_reference or 30
        references = [part[:longest] for part in pairs]
        prompts = [mel[: len(part) * flow.frames_per_token] for mel, part in zip(mels, references, strict=True)]
        whole = [torch.cat(both) for both in zip(references, pairs, strict=True)]
        lengths = torch.tensor([len(part) for part in whole], device=device)
        noise = [flow_noise(seed + k, len(part) * flow.frames_per_token) for k, part in enumerate(whole)]
        with products(device):
            made = flow.sample(
                pad_sequence(whole, batch_first=True).to(device), lengths,
                pad_sequence(prompts, batch_first=True).to(device),
                torch.tensor([len(mel) for mel in prompts], device=device), torch.stack(speakers).to(device),
                pad_sequence(noise, batch_first=True).to(device), steps=self._steps,
            )  # fmt: skip
        frames = [(len(prompt), len(part) * flow.frames_per_token) for prompt, part in zip(prompts, whole, strict=True)]
        return [mel[start:stop].cpu().numpy().astype(np.float16)
                for mel, (start, stop) in zip(made, frames, strict=True)]  # fmt: skip

    def _read(self, audio: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Token pairs (T, 2), the recording's own mel (2T, 80), speaker vector (192,)."""
        audio_16k = np.asarray(soxr.resample(audio, SAMPLE_RATE_HZ, 16_000), np.float32)
        pairs = time_align(torch.from_numpy(interleave(*self._tokenizers(audio_16k)).astype(np.int64)))
        mel = prompt_mel(torch.from_numpy(audio))
        whole = min(len(pairs), len(mel) // self._flow.frames_per_token)
        speaker = torch.from_numpy(self._tokenizers.voice(audio_16k))
        return pairs[:whole], mel[: whole * self._flow.frames_per_token], speaker


def batches(store: Store, shard: str) -> Iterator[list[int]]:
    """Places in the store of a shard's rows that are for training, of similar length."""
    index = {row["index"] for row in json.loads((assets.data_dir() / "features" / shard / "index.json").read_text())}
    places = [place for place, row in enumerate(store.rows) if row["index"] in index]
    places.sort(key=lambda place: float(store.rows[place]["duration_s"]))
    for start in range(0, len(places), BATCH):
        yield places[start : start + BATCH]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=6, help="of the flow")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", help="encode by its tokenizers, not by those of the runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder, device, store = assets.data_dir() / "decoded", pick_device(), Store()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizers = open_tokenizers(arguments.checkpoint, arguments.threads)
    decode = Decoder(trained_flow(device), tokenizers, arguments.steps, device)
    hours = 0.0
    for shard in sorted(path.name for path in (assets.data_dir() / "features").glob("shard-?????")):
        target = folder / f"{shard}.npz"
        if not target.exists() and hours < arguments.hours:
            index, made = [], []
            for places in batches(store, shard):
                made += decode([store.audio(place) for place in places], seed=store.rows[places[0]]["index"])
                index += [store.rows[place]["index"] for place in places]
            lengths = np.array([len(mel) for mel in made])
            partial = target.with_suffix(".partial.npz")
            np.savez(partial, allow_pickle=False, index=np.array(index), lengths=lengths, mel=np.concatenate(made))
            partial.rename(target)
        if target.exists():
            hours += float(np.load(target)["lengths"].sum()) / 50 / 3600
            print(f"{target.name}: {hours:.2f} h", flush=True)


if __name__ == "__main__":
    main()
