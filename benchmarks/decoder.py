"""How fast the decoder is: the flow by batch, steps and precision, the vocoders, and the first audio of a stream.

Random weights at the official sizes, no checkpoint needed:

    python -m benchmarks.decoder                                     # CPU, 2.4 s of reference and 2.4 s of result
    python -m benchmarks.decoder --device cuda --seconds 10 --clock wall

The baseline is the first line, one job at a time in float32: what the published code runs. On a machine that others
use, `--clock cpu --threads 1` counts the processor's time instead of the wall's.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from shared.checkpoints.weights import default_dtype
from shared.models.bigvgan import BigVGAN, BigVGANConfig
from shared.models.flow import Flow, FlowConfig, FlowStream, flow_noise, read_voice
from shared.models.hift import HiFT, HiFTConfig
from shared.models.spectral import SpectralConfig, SpectralVocoder
from shared.models.vocoder_stream import VocoderStream

TOKENS_PER_S, FRAMES_PER_S = 25, 50
FIRST_PAIRS = 15  # a stream's first chunk of 12 and the look-ahead
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Row:
    """One line of the table; `error` is the mean difference of the mel to float32, in its standard deviations."""

    what: str
    batch: int
    steps: int
    seconds: float
    audio_s: float
    error: float | None = None

    @property
    def rtf(self) -> float:
        return self.seconds / (self.batch * self.audio_s)

    def line(self, baseline_rtf: float | None) -> str:
        faster = f"{baseline_rtf / self.rtf:8.1f}x" if baseline_rtf else " " * 9
        error = "" if self.error is None else f"{self.error:10.4f}"
        return (
            f"{self.what:32} {self.batch:5} {self.steps or '':>5} {self.seconds:9.2f} {self.rtf:8.3f} {faster} {error}"
        )


@dataclass(frozen=True)
class Jobs:
    """A batch of equal jobs."""

    tokens: Tensor
    prompt_mel: Tensor
    speaker: Tensor
    noise: Tensor

    @classmethod
    def make(cls, reference_s: float, seconds: float, batch: int, device: str) -> Jobs:
        tokens, prompt = round((reference_s + seconds) * TOKENS_PER_S), round(reference_s * FRAMES_PER_S)
        generator = torch.Generator().manual_seed(0)
        return cls(
            torch.randint(0, 5121, (batch, tokens, 2), generator=generator).to(device),
            torch.randn(batch, prompt, 80, generator=generator).to(device),
            torch.randn(batch, 192, generator=generator).to(device),
            torch.stack([flow_noise(seed, 2 * tokens) for seed in range(batch)]).to(device),
        )

    def run(self, flow: Flow, steps: int) -> Tensor:
        batch, tokens = self.tokens.shape[:2]
        lengths = torch.full((batch,), tokens, device=self.tokens.device)
        prompts = torch.full((batch,), self.prompt_mel.shape[1], device=self.tokens.device)
        return flow.sample(self.tokens, lengths, self.prompt_mel, prompts, self.speaker, self.noise, steps=steps)


def build_flow(device: str) -> Flow:
    """The official sizes; what training starts at zero is random too, so that every layer matters."""
    torch.manual_seed(0)
    flow = Flow(FlowConfig()).eval().to(device)
    for parameter in flow.parameters():
        parameter.requires_grad_(False)
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return flow


def in_precisions(flow: Flow, device: str) -> Iterator[tuple[str, Flow]]:
    """In float32, and in bfloat16 where the device has instructions for it."""
    yield "float32", flow
    if default_dtype(device) == torch.bfloat16:
        yield "bfloat16", copy.deepcopy(flow).to(torch.bfloat16)


def seconds_of(work: Callable[[], Tensor], runs: int, clock: Callable[[], float], device: str) -> tuple[float, Tensor]:
    """Least seconds of `runs` calls, and the last result."""
    times, result = [], torch.empty(0)
    for _ in range(runs):
        began = clock()
        result = work()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(clock() - began)
    return min(times), result


def flow_rows(options: argparse.Namespace, clock: Callable[[], float]) -> Iterator[Row]:
    """The baseline, one job of ten steps in float32, must come first."""
    device, seconds = options.device, options.seconds
    flow = build_flow(device)
    single = Jobs.make(options.reference, seconds, 1, device)
    exact: dict[tuple[int, int], Tensor] = {}
    for name, model in in_precisions(flow, device):
        single.run(model, 1)
        for steps in options.steps:
            for batch in options.batches:
                jobs = Jobs.make(options.reference, seconds, batch, device)
                took, mel = seconds_of(partial(jobs.run, model, steps), options.runs, clock, device)
                wanted = exact.setdefault((batch, steps), mel)
                error = None if wanted is mel else float((mel - wanted).abs().mean() / wanted.std())
                yield Row(f"flow {name}", batch, steps, took, seconds, error)


def vocoder_rows(options: argparse.Namespace, clock: Callable[[], float]) -> Iterator[Row]:
    """HiFT, BigVGAN and the spectral vocoder at batches of 1 and 4."""
    torch.manual_seed(0)
    device = options.device
    hift, bigvgan = HiFT(HiFTConfig()).eval().to(device), BigVGAN(BigVGANConfig()).eval().to(device)
    entries: dict[str, nn.Module] = {"HiFT float32": hift, "BigVGAN float32": bigvgan}
    if default_dtype(device) == torch.bfloat16:
        entries["HiFT bfloat16"] = copy.deepcopy(hift).lower_precision(torch.bfloat16)
        entries["BigVGAN bfloat16"] = copy.deepcopy(bigvgan).lower_precision(torch.bfloat16)
    entries["spectral float32"] = SpectralVocoder(SpectralConfig()).eval().to(device)
    for name, model in entries.items():
        for batch in (1, 4):
            mel = torch.randn(batch, 80, round(options.seconds * FRAMES_PER_S), device=device)
            with torch.inference_mode():
                model(mel[..., :12])
                took, _ = seconds_of(partial(model, mel), options.runs, clock, device)
            yield Row(name, batch, 0, took, options.seconds)


def both_rows(options: argparse.Namespace, clock: Callable[[], float]) -> Iterator[Row]:
    """Tokens to sound, one job of ten steps: flow and HiFT in float32, and both in bfloat16."""
    flow, hift = build_flow(options.device), HiFT(HiFTConfig()).eval().to(options.device)
    job, exact = Jobs.make(options.reference, options.seconds, 1, options.device), None
    for name, model in in_precisions(flow, options.device):
        parts = model, hift if model is flow else hift.lower_precision(torch.bfloat16)
        spoken(*parts, job, 1)
        took, mel = seconds_of(partial(spoken, *parts, job, max(options.steps)), options.runs, clock, options.device)
        exact = mel if exact is None else exact
        error = None if exact is mel else float((mel - exact).abs().mean() / exact.std())
        yield Row(f"flow + HiFT {name}", 1, max(options.steps), took, options.seconds, error)


def spoken(flow: Flow, hift: HiFT, job: Jobs, steps: int) -> Tensor:
    """Make a job's sound; the mel that it was made of."""
    mel = job.run(flow, steps)
    with torch.inference_mode():
        hift(mel[:, job.prompt_mel.shape[1] :].transpose(1, 2))
    return mel


def stream_rows(options: argparse.Namespace, clock: Callable[[], float]) -> Iterator[Row]:
    """From the 25th audio token to the first 0.32 s of sound: the reference, the first chunk, HiFT."""
    flow, hift = build_flow(options.device), HiFT(HiFTConfig()).eval().to(options.device)
    jobs = Jobs.make(options.reference, 0.72, 1, options.device)
    for name, model in in_precisions(flow, options.device):
        for steps in options.steps:
            work = partial(first_audio, model, hift, jobs, steps)
            took, sound = seconds_of(work, options.runs, clock, options.device)
            yield Row(f"first audio of a stream, {name}", 1, steps, took, len(sound) / 24000)


def first_audio(flow: Flow, hift: HiFT, jobs: Jobs, steps: int) -> Tensor:
    """Open a stream and make its first chunk."""
    mel, tokens = jobs.prompt_mel[0], jobs.tokens[0]
    reference = len(mel) // flow.frames_per_token
    stream = FlowStream(read_voice(flow, tokens[:reference], mel, jobs.speaker[0], steps=steps))
    return VocoderStream(hift).push(stream.push(tokens[reference : reference + FIRST_PAIRS]).T)


TABLES = {"flow": flow_rows, "vocoder": vocoder_rows, "both": both_rows, "stream": stream_rows}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reference", type=float, default=2.4, help="Seconds of the reference.")
    parser.add_argument("--seconds", type=float, default=2.4, help="Seconds of the result.")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 4])
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--parts", nargs="+", default=["flow", "vocoder", "both", "stream"], choices=list(TABLES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    timed = f"{options.threads} threads, {options.clock} time, torch {torch.__version__}"
    print(f"{options.device}, {timed}, {options.reference} s of reference, {options.seconds} s of result")
    if default_dtype(options.device) != torch.bfloat16:
        print("bfloat16 is left out: this CPU has no instructions for it")
    print(f"{'what':32} {'batch':>5} {'steps':>5} {'seconds':>9} {'RTF':>8} {'speed':>9} {'mel error':>10}")
    for part in options.parts:
        baseline: float | None = None
        for row in TABLES[part](options, CLOCKS[options.clock]):
            baseline = baseline or (row.rtf if part in ("flow", "both") else None)
            print(row.line(baseline), flush=True)


if __name__ == "__main__":
    main()
