"""The speaker encoder: shapes, any length, and training."""

import pytest
import torch

from shared.models.speaker import SpeakerConfig, SpeakerEncoder

SMALL = SpeakerConfig(front_channels=4, channels=16, growth=8, bottleneck=16, blocks=(2, 3), dilations=(1, 2))


@pytest.mark.parametrize("frames", [2, 98, 199, 200, 201, 450])
def test_an_utterance_of_any_length_gives_one_vector(frames):
    with torch.no_grad():
        assert SpeakerEncoder(SMALL).eval()(torch.randn(3, frames, 80)).shape == (3, 192)


def test_rows_of_a_batch_do_not_mix():
    model, features = SpeakerEncoder(SMALL).eval(), torch.randn(3, 120, 80)
    with torch.no_grad():
        assert torch.allclose(model(features)[1], model(features[1:2])[0], atol=1e-5)


def test_the_segment_mean_is_the_mean_of_its_hundred_steps():
    mask = SpeakerEncoder(SMALL).dense[0].context
    x = torch.randn(1, 16, 250)
    means = mask._segment_means(x)
    assert torch.allclose(means[..., 120], x[..., 100:200].mean(-1), atol=1e-6)
    assert torch.allclose(means[..., 249], x[..., 200:].mean(-1), atol=1e-6)


def test_gradients_reach_every_parameter():
    model = SpeakerEncoder(SMALL).train()
    (model(torch.randn(4, 60, 80)) * torch.randn(192)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_the_default_sizes_are_near_those_of_the_published_file():
    with torch.device("meta"):
        parameters = sum(p.numel() for p in SpeakerEncoder(SpeakerConfig()).parameters())
    assert 6.5e6 < parameters < 7.2e6


def test_blocks_without_a_dilation_are_refused():
    with pytest.raises(ValueError, match="dilation"):
        SpeakerConfig(blocks=(2,), dilations=(1, 2))
