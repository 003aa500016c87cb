"""The decoder model: the official waveform end to end, batches, seeds, and isolation of bad requests."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from services.decoder import model as module
from services.decoder.model import DecoderModel, _batches
from services.decoder.settings import DecoderSettings
from services.decoder.streaming import stretch_prompt_mel, stretched
from shared.errors import UserError
from shared.inference.port import DeadlineExceeded, InferenceRequest, InferenceUnavailable, RequestCancelled
from tests.services.decoder.conftest import GOLDEN


def changed(request: InferenceRequest, *, groups: int | None = None, **parameters: Any) -> InferenceRequest:
    inputs = dict(request.inputs)
    if groups is not None:
        inputs["mixed"] = inputs["mixed"][: 5 * groups]
    return replace(request, inputs=inputs, parameters={**request.parameters, **parameters})


def audio(answer: object) -> np.ndarray:
    assert isinstance(answer, dict), answer
    samples: np.ndarray = answer["audio"]
    return samples


def test_a_request_becomes_the_official_waveform(
    model: DecoderModel, asked: InferenceRequest, golden: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "flow_noise", lambda seed, frames: golden["noise"][0].T[:frames])
    monkeypatch.setattr(model.vocoder, "noise_scale", 0.0)
    found = audio(model.infer([changed(asked, steps=10)])[0])
    assert found.dtype == np.float32
    assert np.abs(found - golden["wav"][0].numpy()).max() < 1e-3


def test_a_mixed_batch_answers_each_as_it_would_alone(model: DecoderModel, asked: InferenceRequest) -> None:
    requests = [
        changed(asked, groups=14),
        changed(asked, groups=13, seed=5),
        changed(asked, groups=4, steps=2),
        changed(asked, groups=12, seed=6),
        changed(asked, groups=12, cfg=0.0),
    ]
    for request, together in zip(requests, model.infer(requests), strict=True):
        alone = audio(model.infer([request])[0])
        assert len(alone) == len(request.inputs["mixed"]) // 5 * 3 * 960
        np.testing.assert_allclose(audio(together), alone, atol=1e-4)


def test_the_seed_decides_the_audio(model: DecoderModel, asked: InferenceRequest) -> None:
    first, again, other = (audio(model.infer([changed(asked, seed=seed)])[0]) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_a_result_is_said_slower_or_faster_by_as_much_as_is_asked_alone_and_in_a_batch(
    model: DecoderModel, asked: InferenceRequest
) -> None:
    requests = [changed(asked, stretch=factor) for factor in (1.0, 0.8, 1.25)]
    plain, faster, slower = (audio(answer) for answer in model.infer(requests))
    frames = len(plain) // 480
    assert (len(faster), len(slower)) == (round(frames * 0.8) * 480, round(frames * 1.25) * 480)
    np.testing.assert_allclose(plain, audio(model.infer([asked])[0]), atol=1e-4)
    np.testing.assert_allclose(slower, audio(model.infer(requests[2:])[0]), atol=1e-4)


def test_a_stretched_mel_keeps_its_values_and_one_frame_at_least() -> None:
    mel = torch.arange(10.0)[:, None].expand(10, 80)
    slower = stretched(mel, 2.0)
    assert slower.shape == (20, 80)
    assert (slower.diff(dim=0) >= 0).all()
    assert (slower.min(), slower.max()) == (0, 9)
    assert stretched(mel, 1.0) is mel
    assert stretched(mel[:1], 0.5).shape == (1, 80)


def test_the_loudest_part_of_a_reference_is_read_where_the_flow_wants_no_more(
    model: DecoderModel, asked: InferenceRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = len(asked.inputs["prompt_mixed"]) // 5 * 3
    mel = stretch_prompt_mel(torch.from_numpy(np.array(asked.inputs["prompt_mel"], np.float32)), pairs, 2)
    mel[:12] -= 9.0
    mel[12:36] += 9.0
    assert pairs > 18
    whole = asked.inputs | {"prompt_mel": mel.numpy()}
    part = whole | {"prompt_mixed": asked.inputs["prompt_mixed"][10:30], "prompt_mel": mel[12:36].numpy()}
    short = audio(model.infer([changed(replace(asked, inputs=part), steps=2)])[0])
    monkeypatch.setattr(model.flow, "config", replace(model.flow.config, longest_reference=12))
    assert np.array_equal(audio(model.infer([changed(replace(asked, inputs=whole), steps=2)])[0]), short)


def test_a_group_cut_short_is_filled(model: DecoderModel, asked: InferenceRequest) -> None:
    inputs = {**asked.inputs, "mixed": asked.inputs["mixed"][:23]}
    assert len(audio(model.infer([replace(asked, inputs=inputs)])[0])) == 5 * 3 * 960


def test_a_reference_of_nothing_leaves_the_voice_to_the_embedding(model: DecoderModel, asked: InferenceRequest) -> None:
    inputs = {**asked.inputs, "prompt_mixed": np.zeros(0, np.int32), "prompt_mel": np.zeros((0, 80), np.float32)}
    assert len(audio(model.infer([replace(asked, inputs=inputs)])[0])) == 14 * 3 * 960


@pytest.mark.parametrize(
    ("inputs", "parameters", "complaint"),
    [
        ({"mixed": np.array([1, 2, 3, 4, 5])}, {}, "position 2"),
        ({"mixed": np.zeros(0, np.int32)}, {}, "no audio tokens"),
        ({"mixed": np.zeros(5, np.float32)}, {}, "mixed is float32"),
        ({"prompt_mel": np.zeros((4, 79), np.float32)}, {}, "prompt_mel has the shape"),
        ({"prompt_mel": np.full((4, 80), np.nan, np.float32)}, {}, "no numbers"),
        ({"speaker_embedding": np.zeros(191, np.float32)}, {}, "speaker_embedding has 191"),
        ({}, {"steps": 0}, "steps is 0"),
        ({}, {"cfg": "loud"}, "cfg is 'loud'"),
        ({}, {"stretch": 3}, "stretch is 3"),
        ({"mixed": np.tile([0, 0, 1024, 1024, 1024], 6000)}, {}, "the limit is 600 s"),
    ],
)
def test_a_bad_request_says_what_is_wrong_and_harms_no_other(
    model: DecoderModel, asked: InferenceRequest, inputs: dict[str, Any], parameters: dict[str, Any], complaint: str
) -> None:
    bad = replace(asked, inputs={**asked.inputs, **inputs}, parameters={**asked.parameters, **parameters})
    good, error = model.infer([changed(asked, groups=2, steps=1), bad])
    assert len(audio(good)) == 2 * 3 * 960
    assert isinstance(error, UserError)
    assert complaint in str(error)


def test_a_missing_input_is_named(model: DecoderModel, asked: InferenceRequest) -> None:
    inputs = {name: value for name, value in asked.inputs.items() if name != "prompt_mel"}
    [error] = model.infer([replace(asked, inputs=inputs)])
    assert "prompt_mel" in str(error)


def test_nobody_s_request_costs_nothing(model: DecoderModel, asked: InferenceRequest) -> None:
    answers = model.infer([replace(asked, cancelled=lambda: True), replace(asked, deadline=0.0)])
    assert isinstance(answers[0], RequestCancelled)
    assert isinstance(answers[1], DeadlineExceeded)
    assert model.stage_s == {}


def test_a_batch_that_nobody_waits_for_any_more_stops_between_steps(
    model: DecoderModel, asked: InferenceRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks, steps = iter(range(100)), []
    estimate = model.flow.decoder.estimator.forward
    monkeypatch.setattr(model.flow.decoder.estimator, "forward", lambda *a, **k: steps.append(1) or estimate(*a, **k))
    [answer] = model.infer([replace(changed(asked, steps=50), cancelled=lambda: next(asks) > 2)])
    assert isinstance(answer, RequestCancelled)
    assert len(steps) == 2


def test_a_batch_goes_on_for_the_one_that_still_waits(model: DecoderModel, asked: InferenceRequest) -> None:
    asks = iter(range(100))
    left, waits = model.infer([replace(asked, cancelled=lambda: next(asks) > 0), changed(asked, seed=1)])
    assert len(audio(left)) == len(audio(waits))


def test_a_batch_that_does_not_fit_memory_runs_one_by_one(
    model: DecoderModel, asked: InferenceRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = model.flow.sample

    def small(tokens: Tensor, *others: Any, **dials: Any) -> Tensor:
        if len(tokens) > 1 or tokens.shape[1] > 50:
            raise torch.OutOfMemoryError("too much")
        return sample(tokens, *others, **dials)

    monkeypatch.setattr(model.flow, "sample", small)
    fits, also, does_not = model.infer([changed(asked, groups=5), changed(asked, groups=6), changed(asked, groups=14)])
    assert len(audio(fits)) < len(audio(also))
    assert isinstance(does_not, InferenceUnavailable)


def test_stages_are_timed(model: DecoderModel, asked: InferenceRequest) -> None:
    model.infer([asked])
    assert set(model.stage_s) == {"flow", "vocoder"}
    assert all(seconds > 0 for seconds in model.stage_s.values())


def test_batches_hold_requests_of_one_kind_and_similar_size_within_the_limit() -> None:
    settings = DecoderSettings(batch_frames=1000, padding_share=0.25)
    sizes = {0: 300, 1: 290, 2: 100, 3: 310, 4: 80, 5: 300, 6: 2000}
    kinds = {5: "other"}
    batches = list(_batches(sizes, lambda index: kinds.get(index, "same"), settings))
    assert sorted(batches) == [[1, 0, 3], [4, 2], [5], [6]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_stays_near_float32(
    model: DecoderModel, asked: InferenceRequest, dtype: Literal["bfloat16", "float16"]
) -> None:
    """Measured on random weights: the waveform's error is 40 dB below the signal; HiFT's noise is the same."""
    half = DecoderModel(module.Checkpoint.resolve(GOLDEN), settings=DecoderSettings(dtype=dtype))
    assert half.flow.encoder_proj.weight.dtype == getattr(torch, dtype)
    wanted, found = (audio(one.infer([asked])[0]) for one in (model, half))
    assert 10 * np.log10(wanted.var() / (wanted - found).var()) > 30
