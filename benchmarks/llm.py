"""How fast the language model reads prompts and writes tokens, by batch and context, against a plainer decode.

Random weights at the official layer sizes with fewer layers, no checkpoint needed:

    python -m benchmarks.llm                                        # 4 of the 32 layers, bf16 and int8
    python -m benchmarks.llm --contexts 512 2048 --batches 1 16 --kinds bfloat16
    python -m benchmarks.llm --device cuda --layers 32 --kinds bfloat16

The baseline builds the bias of heads x context x context in every layer at every step and keeps its last row, as the
published modelling code does. Both compute the same hidden states, and the script stops if they do not. A step is timed
as the engine runs it: padded batch, output head over the audio ids included, sampling not. The last column extrapolates
tokens/s to the official 32 layers. On a busy machine use `--threads 1 --clock cpu`: seconds of processor time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from services.llm.decoding import ExactDecoder, StaticDecoder
from shared.checkpoints.weights import default_dtype
from shared.codes import AUDIO_VOCAB
from shared.models.quantize import HalfLinear, Int8Linear, replace_linears
from shared.models.step1 import Step1, Step1Config
from shared.models.step1_attention import KVCache

OFFICIAL_LAYERS = 32
MIB = 2**20
SLOW_S = 5.0  # work that takes longer is timed less often
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class RebuildingAttend:
    """Decode attention that makes the whole bias anew in every layer: what the official code costs."""

    def __init__(self, cache: KVCache, slots: list[int], slopes: Tensor) -> None:
        self.cache, self.slots, self.slopes = cache, slots, slopes

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for row, slot in enumerate(self.slots):
            keys, values = self.cache.keys[layer, slot], self.cache.values[layer, slot]
            length = self.cache.lengths[slot] + 1
            keys[:, length - 1], values[:, length - 1] = k[row, 0], v[row, 0]
            places = torch.arange(length, device=q.device)
            distance = (places[:, None] - places[None]).to(torch.float32)
            bias = -self.slopes[:, None, None] * distance.clamp(min=0).sqrt()
            bias = bias.masked_fill(distance < 0, -torch.inf).to(q.dtype)[:, -1:]  # (H, 1, length)
            repeats = q.shape[2] // keys.shape[0]
            every_k, every_v = (x[:, :length].repeat_interleave(repeats, dim=0) for x in (keys, values))
            scores = q[row].transpose(0, 1) @ every_k.transpose(1, 2) / q.shape[3] ** 0.5 + bias
            out[row] = (scores.float().softmax(-1).to(q.dtype) @ every_v).transpose(0, 1)
        return out


def rebuilding_step(model: Step1, cache: KVCache, tokens: list[int], slots: list[int]) -> Tensor:
    """The baseline's decode step, hidden states (B, hidden)."""
    attend = RebuildingAttend(cache, slots, model.alibi.slopes_on(model.device))
    x = model.model.embed_tokens(torch.tensor(tokens, device=model.device))[:, None]
    for index, layer in enumerate(model.model.layers):
        x = layer(x, index, attend)
    hidden: Tensor = model.model.norm(x[:, 0])
    return hidden


def peak_mib(work: Callable[[], object], device: torch.device) -> float:
    """MiB that a piece of work needs on top of what is there before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def best_s(work: Callable[[], object], device: torch.device, runs: int, clock: str) -> float:
    """Seconds of the fastest of some runs, after one that does not count; fewer runs of what is slow."""
    times: list[float] = []
    for _ in range(runs + 1):
        if len(times) > 1 and sum(times) > SLOW_S:
            break
        began = CLOCKS[clock]()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(CLOCKS[clock]() - began)
    return min(times[1:])


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    batch: int
    context: int
    seconds: float
    tokens: int
    memory_mib: float
    layers: int
    rest_s: float = 0.0

    def __str__(self) -> str:
        whole = (self.seconds - self.rest_s) * OFFICIAL_LAYERS / self.layers + self.rest_s
        return (
            f"{self.what:28} {self.batch:5} {self.context:7} {self.seconds * 1e3:10.1f} "
            f"{self.tokens / self.seconds:10.2f} {self.memory_mib:9.0f} {self.tokens / whole:12.3f}"
        )


def build(kind: str, layers: int, device: str, audio_ids: int) -> Step1:
    """A random model of official width; its vocabulary is just the audio ids and a little text."""
    config = Step1Config(hidden_size=3072, intermediate_size=8192, num_attention_heads=48, num_attention_groups=4,
                         num_hidden_layers=layers, vocab_size=audio_ids + 64)  # fmt: skip
    model = Step1(config)
    model.initialise()
    dtypes = {"int8": default_dtype(device), "half": torch.float32}
    model = model.to(device, dtypes.get(kind) or getattr(torch, kind)).eval()
    if kind == "int8":
        replace_linears(model, Int8Linear.of)
    elif kind == "half":
        replace_linears(model, HalfLinear.of)
        model.join()
    return model


def prefill_row(model: Step1, kind: str, context: int, runs: int, clock: str) -> Row:
    cache = model.new_cache(slots=1, capacity=context)
    prompt = torch.randint(0, 64, (context,), generator=torch.Generator().manual_seed(0))

    def read() -> None:
        cache.lengths[0] = 0
        model.prefill(prompt, cache, 0)

    read()  # touches the cache's pages: they are not counted
    began = CLOCKS[clock]()
    memory = peak_mib(read, model.device)
    seconds = CLOCKS[clock]() - began
    if seconds < SLOW_S or model.device.type == "cuda":
        seconds = best_s(read, model.device, max(1, runs // 3), clock)
    return Row(f"{kind} prefill", 1, context, seconds, context, memory, model.config.num_hidden_layers)


def decode_rows(
    model: Step1, kind: str, batches: list[int], context: int, runs: int, clock: str, baseline_to: int
) -> list[Row]:
    """Decode steps at a context for some batch sizes, and the baseline's, checked against each other."""
    device, layers = model.device, model.config.num_hidden_layers
    choices = torch.arange(64 - 1, 64 + AUDIO_VOCAB, device=device)
    make = StaticDecoder if device.type == "cuda" else ExactDecoder
    decoder = make(model, choices, slots=max(batches), capacity=context + 2)
    cache = decoder.cache
    cache.keys[:, :, :, :context].normal_()
    cache.values[:, :, :, :context].normal_()

    def ready(batch: int) -> tuple[list[int], list[int]]:
        cache.lengths = [context] * max(batches)
        return list(range(batch)), list(range(batch))

    rows = []
    for batch in batches:
        hidden = decoder.step(*ready(batch))
        rest_s = best_s(lambda hidden=hidden: decoder.logits(hidden), device, runs, clock)  # type: ignore[misc]
        step = lambda batch=batch: decoder.logits(decoder.step(*ready(batch)))  # noqa: E731
        memory = peak_mib(step, device)
        seconds = best_s(step, device, runs, clock)
        rows.append(Row(f"{kind} decode", batch, context, seconds, batch, memory, layers, rest_s))
        if context <= baseline_to and batch == 1:
            slow = rebuilding_step(model, cache, *ready(batch))
            difference = (slow - hidden).float().norm() / hidden.float().norm()
            if difference > 0.03:
                raise SystemExit(f"the baseline differs by {difference:.3f}: one of the two is wrong")
            old = lambda batch=batch: rebuilding_step(model, cache, *ready(batch))  # noqa: E731
            memory = peak_mib(old, device)
            seconds = best_s(old, device, max(1, runs // 5), clock)
            rows.append(Row(f"{kind} decode, rebuilding", batch, context, seconds, batch, memory, layers))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--kinds", nargs="+", choices=["float32", "bfloat16", "half", "int8"],
        help="Default: int8, and bfloat16 where the device has instructions for it, else float32 and half (float32 "
        "with weights in float16, where the CPU has the kernel).",
    )  # fmt: skip
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--baseline-to", type=int, default=2048, help="Longest context that the baseline runs at.")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    timed = f"{options.threads} threads, {options.clock} time, torch {torch.__version__}"
    print(f"{options.layers} layers of 3072, {options.device}, {timed}")
    print(f"{'what':28} {'batch':>5} {'context':>7} {'ms':>10} {'tokens/s':>10} {'peak MiB':>9} {'32 layers':>12}")
    dtype = default_dtype(options.device)
    half = ["half"] if HalfLinear.works(dtype, options.device) else []
    for kind in options.kinds or [str(dtype).removeprefix("torch."), *half, "int8"]:
        with torch.inference_mode():
            model = build(kind, options.layers, options.device, AUDIO_VOCAB)
            for context in options.contexts:
                print(prefill_row(model, kind, context, options.runs, options.clock), flush=True)
                rows = decode_rows(
                    model, kind, options.batches, context, options.runs, options.clock, options.baseline_to
                )
                print(*rows, sep="\n", flush=True)


if __name__ == "__main__":
    main()
