"""How fast the front end is: the linguistic encoder against the published chunk loop, and every other stage.

Random weights at the official sizes, float32, no checkpoint needed:

    python -m benchmarks.tokenizer                      # 50 blocks of 512, 8 s of audio
    python -m benchmarks.tokenizer --seconds 8 30 --blocks 50 --threads 2

The baseline is the chunk loop [0, 4, 5] with four chunks of look-back as the published code runs it: one chunk after
the other, caches carried along. Both compute the same numbers, and the script stops if they do not.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from shared.audio.features import linguistic_features, prompt_mel, speaker_fbank, whisper_log_mel
from shared.audio.signal import limit_peak, normalize_peak, resample, trim_silence
from shared.models.linguistic import LinguisticConfig, LinguisticEncoder, SanmBlock, positions


class ChunkLoop:
    """The same encoder, one chunk at a time with caches of keys and values."""

    def __init__(self, encoder: LinguisticEncoder) -> None:
        self.encoder = encoder
        self.config = encoder.config
        self.blocks: list[SanmBlock] = [*encoder.encoders0, *encoder.encoders]

    def __call__(self, features: Tensor) -> Tensor:
        """Features (1, T, input) -> hidden states (1, T, D)."""
        config, outputs = self.config, []
        overlap = features.new_zeros(1, config.overlap, features.shape[-1])
        keys: list[Tensor | None] = [None] * len(self.blocks)
        values: list[Tensor | None] = [None] * len(self.blocks)
        for start in range(0, features.shape[1], config.chunk):
            chunk = features[:, start : start + config.chunk] * math.sqrt(config.output_size)
            chunk = chunk + positions(start + chunk.shape[1], chunk.shape[2])[start:]
            x = torch.cat([overlap, chunk], dim=1)
            overlap = x[:, -config.overlap :]
            for index, block in enumerate(self.blocks):
                x, keys[index], values[index] = self._block(block, x, keys[index], values[index])
            outputs.append(self.encoder.after_norm(x)[:, config.overlap :])
        return torch.cat(outputs, dim=1)

    def _block(self, block: SanmBlock, x: Tensor, keys: Tensor | None, values: Tensor | None
               ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        config, attention = self.config, block.self_attn
        query, key, value = attention.linear_q_k_v(block.norm1(x)).chunk(3, dim=-1)
        seen_keys = key if keys is None else torch.cat([keys, key], dim=1)
        seen_values = value if values is None else torch.cat([values, value], dim=1)
        context = functional.scaled_dot_product_attention(
            self._heads(query), self._heads(seen_keys), self._heads(seen_values)
        )
        context = context.transpose(1, 2).reshape(value.shape)
        padded = functional.pad(value.transpose(1, 2), (config.kernel_size // 2, config.kernel_size // 2))
        memory = attention.fsmn_block(padded).transpose(1, 2) + value
        attended = attention.linear_out(context) + memory
        x = x + attended if block.has_residual else attended
        x = x + block.feed_forward(block.norm2(x))
        kept = config.look_back * config.chunk
        return x, seen_keys[:, : -config.overlap][:, -kept:], seen_values[:, : -config.overlap][:, -kept:]

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(1, x.shape[1], self.config.attention_heads, -1).transpose(1, 2)


@dataclass(frozen=True)
class Timing:
    """Seconds of the runs of one stage."""

    runs: list[float]

    @property
    def median(self) -> float:
        """The middle run in seconds."""
        return statistics.median(self.runs)


def timed(work: Callable[[], object], runs: int) -> Timing:
    """Runs once to warm up, then `runs` times."""
    work()
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return Timing(seconds)


def alternate(first: Callable[[], object], second: Callable[[], object], runs: int) -> tuple[Timing, Timing]:
    """Times two things in turns, so that a disturbance of the machine meets both."""
    first(), second()
    pairs = [(timed_once(first), timed_once(second)) for _ in range(runs)]
    return Timing([pair[0] for pair in pairs]), Timing([pair[1] for pair in pairs])


def timed_once(work: Callable[[], object]) -> float:
    """Seconds of one run."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def linguistic_rows(seconds: float, config: LinguisticConfig, runs: int) -> list[str]:
    """Table rows of the encoder: the chunk loop and all chunks at once."""
    torch.manual_seed(0)
    encoder = LinguisticEncoder(config).eval()
    loop = ChunkLoop(encoder)
    features = torch.randn(1, round(seconds / 0.06), config.input_size)
    difference = float((loop(features) - encoder(features)).abs().max())
    if difference > 1e-3:
        raise SystemExit(f"the two ways differ by {difference}")
    slow, fast = alternate(lambda: loop(features), lambda: encoder(features), runs)
    ratio = statistics.median(a / b for a, b in zip(slow.runs, fast.runs, strict=True))
    name = f"linguistic encoder, {config.num_blocks} x {config.output_size}"
    return [
        row(f"{name}, chunk loop", slow, seconds, f"largest difference {difference:.1e}"),
        row(f"{name}, all chunks at once", fast, seconds, f"**{ratio:.2f} times faster** (median of pairs)"),
    ]


def feature_rows(seconds: float, runs: int) -> list[str]:
    """Table rows of the signal and feature stages for a 44.1 kHz recording."""
    torch.manual_seed(0)
    recording = torch.randn(round(seconds * 44100)) * 0.1
    at16, at24 = resample(recording, 44100, 16000), resample(recording, 44100, 24000)
    stages: list[tuple[str, Callable[[], object]]] = [
        ("peak, resample to 16 kHz, trim",
         lambda: trim_silence(normalize_peak(resample(limit_peak(recording), 44100, 16000)))),
        ("linguistic features", lambda: linguistic_features(at16)),
        ("whisper log mel", lambda: whisper_log_mel(at16)),
        ("speaker filter bank", lambda: speaker_fbank(at16)),
        ("prompt mel", lambda: prompt_mel(at24)),
    ]  # fmt: skip
    return [row(name, timed(work, runs), seconds, "") for name, work in stages]


def row(name: str, timing: Timing, seconds: float, note: str) -> str:
    """One line of the table."""
    return f"| {name} | {seconds:g} | {timing.median:.3f} | {timing.median / seconds:.4f} | {note} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, nargs="+", default=[8.0], help="durations of the recordings")
    parser.add_argument("--blocks", type=int, default=50, help="SAN-M blocks; the official encoder has 50")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = replace(LinguisticConfig(), num_blocks=options.blocks)
    print(f"{options.threads} threads, float32, random weights, PyTorch {torch.__version__}, {options.runs} runs\n")
    print("| stage | audio s | seconds | RTF | |\n|---|---|---|---|---|")
    with torch.inference_mode():
        for seconds in options.seconds:
            print("\n".join([*linguistic_rows(seconds, config, options.runs), *feature_rows(seconds, options.runs)]))


if __name__ == "__main__":
    main()
