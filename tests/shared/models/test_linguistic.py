"""The linguistic encoder against the official chunk loop's numbers, and against itself in batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

from shared.models.linguistic import LinguisticConfig, LinguisticEncoder, nearest

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "linguistic_small"
CLIPS = ("en_happy_prompt", "zero_shot_en_prompt")


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="module")
def encoder() -> LinguisticEncoder:
    config = LinguisticConfig.from_published(yaml.safe_load((GOLDEN / "config.yaml").read_text()))
    encoder = LinguisticEncoder(config).eval()
    state = torch.load(GOLDEN / "model.pt", weights_only=True)
    encoder.load_state_dict({name.removeprefix("encoder."): tensor for name, tensor in state.items()})
    return encoder


@pytest.mark.parametrize("clip", CLIPS)
def test_hidden_states_and_codes_equal_the_official_chunk_loop(encoder, io, clip):
    with torch.no_grad():
        hidden = encoder(io[f"{clip}.features"])
    assert torch.allclose(hidden, io[f"{clip}.encoder_out"], atol=2e-5)
    centroids = torch.from_numpy(np.load(GOLDEN / "linguistic_tokenizer.npy"))
    two = torch.cdist(hidden[0], centroids).topk(2, largest=False).values
    clear = two[:, 1] - two[:, 0] > 1e-3
    assert clear.float().mean() > 0.9
    assert torch.equal(nearest(hidden[0], centroids)[clear], io[f"{clip}.codes"][clear])


def test_a_batch_of_unequal_lengths_gives_each_utterance_its_own_numbers(encoder, io):
    features = [io[f"{CLIPS[0]}.features"][0, :n] for n in (123, 1, 3, 4, 5, 22)]
    lengths = torch.tensor([len(f) for f in features])
    with torch.no_grad():
        together = encoder(pad_sequence(features, batch_first=True), lengths)
        alone = [encoder(f[None])[0] for f in features]
    for row, single in zip(together, alone, strict=True):
        assert torch.allclose(row[: len(single)], single, atol=1e-5)
        assert not row[len(single) :].any()


def test_a_frame_depends_on_nothing_after_its_chunk(encoder, io):
    features = io[f"{CLIPS[0]}.features"][:, :40]
    changed = features.clone()
    changed[:, 20:] += 1
    with torch.no_grad():
        assert torch.equal(encoder(features)[:, :20], encoder(changed)[:, :20])


def test_gradients_are_finite_and_reach_every_parameter_in_a_padded_batch(encoder):
    model = LinguisticEncoder(LinguisticConfig(**{**vars(encoder.config), "dropout_rate": 0.1})).train()
    hidden = model(torch.randn(3, 21, 560), torch.tensor([21, 9, 2]))
    hidden.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_no_frames_give_no_states(encoder):
    assert encoder(torch.zeros(2, 0, 560)).shape == (2, 0, 64)


@pytest.mark.parametrize(
    "wrong", [{"attention_heads": 3}, {"kernel_size": 4}, {"num_blocks": 0}, {"overlap": 0}, {"attention_heads": -4}]
)
def test_sizes_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError):
        LinguisticConfig(**wrong)


def test_the_published_sizes_give_652_tensors():
    with torch.device("meta"):
        assert len(LinguisticEncoder(LinguisticConfig()).state_dict()) == 652
