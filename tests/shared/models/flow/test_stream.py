"""Streaming through the flow: what it costs against one pass, and that streams do not disturb each other."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shared.models.flow import Flow, FlowStream, flow_noise, read_voice


def chunks(tokens: Tensor, sizes: list[int], lookahead: int) -> Iterator[tuple[Tensor, bool]]:
    start = 0
    for size in sizes:
        yield tokens[start : start + size + lookahead], False
        start += size
    yield tokens[start:], True


def open_stream(flow: Flow, golden: dict[str, Tensor], tokens: Tensor, **dials: object) -> FlowStream:
    reading = {name: dials.pop(name) for name in ("steps",) if name in dials} | {"noise": dials.get("noise")}
    voice = read_voice(flow, golden["prompt"], golden["prompt_mel"], golden["speaker"], **reading)  # type: ignore[arg-type]
    return FlowStream(voice, **dials)  # type: ignore[arg-type]


def test_streaming_stays_near_one_pass(flow: Flow, golden: dict[str, Tensor]) -> None:
    """Chunks see no future beyond their look-ahead. On this random network: mean error 0.03 of a deviation of 1.5."""
    tokens = golden["tokens"]
    stream = open_stream(flow, golden, tokens, noise=golden["noise"])
    mel = torch.cat([stream.push(part, last=last) for part, last in chunks(tokens, [15], flow.lookahead)])
    assert mel.shape == golden["mel"].shape
    assert (mel - golden["mel"]).abs().mean() < 0.1


def test_one_chunk_that_is_also_the_last_sees_what_one_pass_sees_except_in_the_reference(
    flow: Flow, golden: dict[str, Tensor]
) -> None:
    tokens = golden["tokens"]
    stream = open_stream(flow, golden, tokens, noise=golden["noise"])
    assert (stream.push(tokens, last=True) - golden["mel"]).abs().mean() < 0.05


def test_a_stream_moves_the_rough_mel_to_the_reference_as_one_pass_does(
    flow: Flow, golden: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured: the shift changes the mel by 0.67 on average, streaming by 0.04."""
    monkeypatch.setattr(flow, "config", replace(flow.config, voiced_rough=True))
    tokens, both, prompt_mel = golden["tokens"], golden["all_tokens"], golden["prompt_mel"]
    whole = flow.sample(
        both[None], torch.tensor([len(both)]), prompt_mel[None], torch.tensor([len(prompt_mel)]),
        golden["speaker"][None], golden["noise"][None, : 2 * len(both)],
    )[0, len(prompt_mel) :]  # fmt: skip
    stream = open_stream(flow, golden, tokens, noise=golden["noise"])
    mel = torch.cat([stream.push(part, last=last) for part, last in chunks(tokens, [15], flow.lookahead)])
    moved, apart = (whole - golden["mel"]).abs().mean(), (mel - whole).abs().mean()
    assert apart < 0.2 * moved


def test_the_seed_gives_a_stream_the_noise_that_one_pass_gets(flow: Flow, golden: dict[str, Tensor]) -> None:
    tokens = golden["tokens"]
    frames = 2 * len(golden["all_tokens"])
    voice = read_voice(flow, golden["prompt"], golden["prompt_mel"], golden["speaker"], steps=2)
    given, seeded = FlowStream(voice, noise=flow_noise(5, frames)), FlowStream(voice, seed=5)
    for part, last in chunks(tokens, [15, 7], flow.lookahead):
        assert torch.equal(given.push(part, last=last), seeded.push(part, last=last))


def test_interleaved_streams_equal_streams_run_alone(flow: Flow, golden: dict[str, Tensor]) -> None:
    first, second = golden["tokens"], golden["tokens"].flip(0)
    sizes = [15, 6]
    alone = []
    for seed, tokens in enumerate((first, second)):
        stream = open_stream(flow, golden, tokens, seed=seed, steps=2)
        alone.append([stream.push(part, last=last) for part, last in chunks(tokens, sizes, flow.lookahead)])
    streams = [open_stream(flow, golden, tokens, seed=seed, steps=2) for seed, tokens in enumerate((first, second))]
    both = [chunks(tokens, sizes, flow.lookahead) for tokens in (first, second)]
    for index, parts in enumerate(zip(*both, strict=True)):
        for which, (part, last) in enumerate(parts):
            assert torch.equal(streams[which].push(part, last=last), alone[which][index])


def test_streams_that_share_a_reading_equal_streams_with_their_own(flow: Flow, golden: dict[str, Tensor]) -> None:
    tokens = golden["tokens"]
    voice = read_voice(flow, golden["prompt"], golden["prompt_mel"], golden["speaker"], steps=2)
    assert voice.size_bytes > 2 * 2 * len(golden["prompt_mel"]) * flow.config.estimator.hidden_size
    for seed in range(3):
        own = open_stream(flow, golden, tokens, seed=seed, steps=2)
        shared = FlowStream(voice, seed=seed)
        for part, last in chunks(tokens, [15], flow.lookahead):
            assert torch.equal(own.push(part, last=last), shared.push(part, last=last))


@pytest.mark.parametrize("pairs", [0, 2, 3])
def test_a_reference_within_the_look_ahead_is_made_with_the_first_chunk(
    flow: Flow, golden: dict[str, Tensor], pairs: int
) -> None:
    voice = read_voice(flow, golden["prompt"][:pairs], golden["prompt_mel"][: 2 * pairs], golden["speaker"], steps=2)
    assert voice.blocks is None
    assert FlowStream(voice).push(golden["tokens"], last=True).shape == (2 * len(golden["tokens"]), 80)


def test_attention_reaches_the_reference_and_a_bounded_past(flow: Flow, golden: dict[str, Tensor]) -> None:
    tokens = golden["tokens"].repeat(6, 1)
    stream = open_stream(flow, golden, tokens, steps=1, left_context_frames=20)
    for part, last in chunks(tokens, [15] * 10, flow.lookahead):
        stream.push(part, last=last)
        assert stream._blocks is not None
        assert stream._blocks[0][0].keys.shape[2] <= len(golden["prompt_mel"]) + 20


def test_a_reference_of_the_wrong_length_is_refused(flow: Flow, golden: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="frames"):
        read_voice(flow, golden["prompt"], golden["prompt_mel"][:-1], golden["speaker"])
