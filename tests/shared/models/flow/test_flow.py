"""The flow against the official implementation, batches against single runs, and the training loss."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.models.flow import Flow, FlowConfig, FlowTraining, flow_noise
from shared.models.flow.flow import voice_shift


def sample(flow: Flow, golden: dict[str, Tensor], **dials: Any) -> Tensor:
    tokens, prompt_mel = golden["all_tokens"][None], golden["prompt_mel"][None]
    lengths, prompt_lengths = torch.tensor([tokens.shape[1]]), torch.tensor([prompt_mel.shape[1]])
    noise = golden["noise"][None, : 2 * tokens.shape[1]]
    mel = flow.sample(tokens, lengths, prompt_mel, prompt_lengths, golden["speaker"][None], noise, **dials)
    return mel[0, prompt_mel.shape[1] :]


def test_ten_steps_give_the_official_mel(flow: Flow, golden: dict[str, Tensor]) -> None:
    assert (sample(flow, golden) - golden["mel"]).abs().max() < 1e-3


def test_the_published_sizes_have_the_published_tensors() -> None:
    with torch.device("meta"):
        state = Flow(FlowConfig()).state_dict()
    assert len(state) == 605
    assert sum(tensor.numel() for tensor in state.values()) == 153_754_096
    assert state["decoder.estimator.blocks.15.conv.block.6.weight"].shape == (512, 512, 3)
    assert state["decoder.estimator.blocks.0.adaLN_modulation.1.weight"].shape == (4608, 512)
    assert state["encoder.up_encoders.3.self_attn.linear_pos.weight"].shape == (512, 512)


def test_a_batch_of_different_lengths_equals_single_runs(flow: Flow) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths, prompts = [24, 41, 30], [8, 20, 0]
    tokens = torch.randint(0, 5121, (3, 41, 2), generator=generator)
    prompt_mel = torch.randn(3, 40, 80, generator=generator)
    speaker = torch.randn(3, 192, generator=generator)
    noise = torch.randn(3, 82, 80, generator=generator)
    prompt_lengths = torch.tensor(prompts)
    batch = flow.sample(tokens, torch.tensor(lengths), prompt_mel, prompt_lengths, speaker, noise, steps=4)
    for i, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        one = slice(i, i + 1)
        alone = flow.sample(
            tokens[one, :length],
            torch.tensor([length]),
            prompt_mel[one, :prompt],
            prompt_lengths[one],
            speaker[one],
            noise[one, : 2 * length],
            steps=4,
        )
        torch.testing.assert_close(batch[i, : 2 * length], alone[0], atol=2e-5, rtol=1e-4)


def test_a_longer_draw_of_noise_begins_with_the_shorter_and_a_seed_decides_it() -> None:
    assert torch.equal(flow_noise(7, 50), flow_noise(7, 333)[:50])
    assert not torch.equal(flow_noise(7, 50), flow_noise(8, 50))


def test_guidance_off_differs_from_guidance_on(flow: Flow, golden: dict[str, Tensor]) -> None:
    assert (sample(flow, golden, cfg_rate=0.0) - sample(flow, golden)).abs().max() > 0.1


def test_four_steps_stay_near_ten(flow: Flow, golden: dict[str, Tensor]) -> None:
    """With random weights: mean error 0.23 of a mel whose standard deviation is 1.5."""
    assert (sample(flow, golden, steps=4) - golden["mel"]).abs().mean() < 0.4


def test_bfloat16_stays_near_float32(flow: Flow, golden: dict[str, Tensor]) -> None:
    """Measured: mean error 0.008, of a mel whose standard deviation is 1.5 (guidance and steps stay in float32)."""
    half = copy.deepcopy(flow).to(torch.bfloat16)
    assert (sample(half, golden) - golden["mel"]).abs().mean() < 0.02


@pytest.fixture
def held(config: dict[str, Any], flow: Flow) -> Flow:
    """The golden flow, held to its rough mel, which is moved to the reference's voice."""
    section = copy.deepcopy(config["flow"])
    section["decoder"]["rough_guidance"] = {"width": 6, "until": 0.8}
    section["voiced_rough"] = True
    model = Flow(FlowConfig.from_dict(section)).eval()
    model.load_state_dict(flow.state_dict())
    return model


def test_rough_guidance_gives_the_mel_the_rough_mels_course_along_the_bins(
    flow: Flow, held: Flow, golden: dict[str, Tensor]
) -> None:
    """Measured: a quarter of the distance between coarse courses is left, of that between fine ones nearly all."""
    with torch.inference_mode():
        rough = flow.encode(golden["all_tokens"][None], torch.tensor([len(golden["all_tokens"])]))
    given = len(golden["prompt_mel"])
    shift = held.shift(rough[:, :given], golden["prompt_mel"][None], torch.tensor([given]))
    rough = (rough + shift)[0, given:]

    def coarse(mel: Tensor) -> Tensor:
        return mel.unflatten(-1, (5, 16)).mean(-1)

    def fine(mel: Tensor) -> Tensor:
        return mel.diff(dim=-1)

    free, bound = sample(flow, golden), sample(held, golden)
    assert (coarse(bound) - coarse(rough)).abs().mean() < 0.5 * (coarse(free) - coarse(rough)).abs().mean()
    assert (fine(bound) - fine(rough)).abs().mean() > 0.8 * (fine(free) - fine(rough)).abs().mean()


def test_the_rough_mel_is_moved_by_what_the_louder_frames_of_a_reference_have_more() -> None:
    generator = torch.Generator().manual_seed(3)
    rough, timbre = torch.randn(2, 12, 80, generator=generator), torch.linspace(-1, 1, 80)
    mel = rough + timbre
    mel[:, 1::2] = -20
    shift = voice_shift(rough, mel, torch.tensor([12, 0]))
    torch.testing.assert_close(shift[0, 0], timbre)
    assert not shift[1].any(), "no reference, no shift"
    mel[0, 8:] += 5
    torch.testing.assert_close(voice_shift(rough, mel, torch.tensor([8, 8]))[0, 0], timbre)
    mel[0, :, 40:] = 1 + 0.1 * torch.randn(12, 40, generator=generator)
    shift = voice_shift(rough, mel, torch.tensor([12, 12]))[0, 0]
    assert shift[:40].abs().min() > 0
    assert not shift[40:].any(), "steady noise is no voice"


def test_rough_guidance_keeps_a_batch_equal_to_single_runs(held: Flow, golden: dict[str, Tensor]) -> None:
    tokens, prompt_mel, speaker = golden["all_tokens"], golden["prompt_mel"], golden["speaker"]
    lengths, prompts = torch.tensor([len(tokens), len(tokens) - 9]), torch.tensor([len(prompt_mel), 0])
    noise = flow_noise(1, 2 * len(tokens)).expand(2, -1, -1)
    pair = (tokens.expand(2, -1, -1), lengths, prompt_mel.expand(2, -1, -1), prompts, speaker.expand(2, -1))
    batch = held.sample(*pair, noise, steps=3)
    short = int(lengths[1])
    alone = held.sample(
        tokens[None, :short], lengths[1:], prompt_mel[None, :0], prompts[1:], speaker[None], noise[1:, : 2 * short],
        steps=3,
    )  # fmt: skip
    torch.testing.assert_close(batch[1, : 2 * short], alone[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dials", [{"width": 0, "until": 0.8}, {"width": 6, "until": 1.0}])
def test_rough_guidance_that_cannot_be_is_refused(config: dict[str, Any], dials: dict[str, float]) -> None:
    section = copy.deepcopy(config["flow"])
    section["decoder"]["rough_guidance"] = dials
    with pytest.raises(ValueError, match="rough guidance"):
        FlowConfig.from_dict(section)


def test_an_unsupported_structure_is_refused_by_name(config: dict[str, Any]) -> None:
    section = copy.deepcopy(config["flow"])
    section["encoder"]["normalize_before"] = False
    with pytest.raises(ValueError, match=r"flow\.encoder\.normalize_before"):
        FlowConfig.from_dict(section)


@pytest.fixture
def small_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "tokens": torch.randint(0, 5121, (2, 20, 2), generator=generator),
        "lengths": torch.tensor([20, 13]),
        "mel": torch.randn(2, 38, 80, generator=generator),
        "mel_lengths": torch.tensor([38, 26]),
        "speaker": torch.randn(2, 192, generator=generator),
    }


def test_the_loss_ignores_everything_beyond_the_lengths(flow: Flow, small_batch: dict[str, Tensor]) -> None:
    first = flow.loss(**small_batch, generator=torch.Generator().manual_seed(0))
    small_batch["tokens"][1, 13:] = 7
    small_batch["mel"][1, 26:] = 100.0
    second = flow.loss(**small_batch, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first.total, second.total)
    torch.testing.assert_close(first.prior, second.prior)


def test_the_prior_term_joins_the_loss_by_its_weight(flow: Flow, small_batch: dict[str, Tensor]) -> None:
    loss = flow.loss(**small_batch, dials=FlowTraining(prior_weight=0.5), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss.total, loss.cfm + 0.5 * loss.prior)


@pytest.mark.parametrize(("norm", "voiced"), [("l1", False), ("l2", False), ("l1", True)])
def test_training_steps_lower_the_loss(
    config: dict[str, Any], small_batch: dict[str, Tensor], norm: str, voiced: bool
) -> None:
    torch.manual_seed(0)
    model = Flow(FlowConfig.from_dict(config["flow"] | {"voiced_rough": voiced})).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    dials = FlowTraining(norm=norm, prior_weight=1.0)
    seen = []
    for step in range(30):
        loss = model.loss(**small_batch, dials=dials, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        seen.append(loss.total.item())
    assert sum(seen[-5:]) < 0.9 * sum(seen[:5])
    assert all(parameter.grad is not None for parameter in model.parameters())
