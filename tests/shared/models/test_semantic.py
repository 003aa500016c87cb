"""The semantic encoder: rates, batches, codebooks."""

import pytest
import torch

from shared.models.semantic import (
    SemanticConfig,
    SemanticEncoder,
    WhisperSemanticConfig,
    WhisperSemanticEncoder,
    grid_codebook,
    halved,
)

SMALL = SemanticConfig(size=32, heads=4, layers=2, codebook_dim=32, codebook_size=64)

ABOVE_WHISPER = WhisperSemanticConfig(
    bins=20, size=32, heads=4, layers=2, width=16, own_heads=2, own_layers=1, codebook_size=64, codebook_dim=8
)


def encoder(**changes) -> SemanticEncoder:
    torch.manual_seed(0)
    return SemanticEncoder(SemanticConfig(**{**vars(SMALL), **changes})).eval()


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 99, 3000])
def test_a_second_of_mel_gives_twenty_five_codes(frames):
    codes = encoder()(torch.randn(1, 128, frames), torch.tensor([frames]))
    assert codes.shape == (1, -(-frames // 4))
    assert int(halved(halved(torch.tensor(frames)))) == codes.shape[1]


def test_a_padded_batch_gives_each_row_its_own_vectors():
    model, feats, lengths = encoder(), torch.randn(3, 128, 80), torch.tensor([80, 41, 2])
    with torch.no_grad():
        together = model.encode(feats, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = model.encode(feats[row : row + 1, :, :length], lengths[row : row + 1])[0]
            assert torch.allclose(together[row, : len(alone)], alone, atol=1e-5)


def test_vectors_find_the_nearest_code_by_either_distance():
    vectors = torch.randn(1, 200, 32)
    euclid = encoder(distance="euclid")
    assert torch.equal(euclid.quantize(vectors)[0], torch.cdist(vectors[0], euclid.codebook).argmin(1))
    cosine = encoder()
    similarity = torch.cosine_similarity(vectors[0][:, None], cosine.codebook[None], dim=-1)
    assert torch.equal(cosine.quantize(vectors)[0], similarity.argmax(1))


def test_a_grid_codebook_is_scalar_quantisation():
    model = encoder(codebook_dim=4, codebook_size=4096, distance="euclid", bounded=True)
    model.codebook.copy_(grid_codebook((8, 8, 8, 8)))
    vectors = model.encode(torch.randn(1, 128, 40), torch.tensor([40]))
    rounded = ((vectors + 1) * 3.5).round() / 3.5 - 1
    assert torch.allclose(model.codebook[model.quantize(vectors)], rounded, atol=1e-6)


def test_gradients_reach_every_parameter():
    model = encoder(codebook_dim=8).train()
    (model.encode(torch.randn(2, 128, 30), torch.tensor([30, 11])) * torch.randn(8)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_sizes_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="heads"):
        SemanticConfig(size=30, heads=4)


def test_the_published_sizes_give_the_published_shapes():
    with torch.device("meta"):
        model = SemanticEncoder(SemanticConfig())
    assert model.codebook.shape == (4096, 1280)
    assert model.conv2.weight.shape == (1280, 1280, 3)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 99, 3000])
def test_above_whisper_a_second_of_mel_gives_twenty_five_codes_too(frames):
    codes = WhisperSemanticEncoder(ABOVE_WHISPER)(torch.randn(1, 20, frames), torch.tensor([frames]))
    assert codes.shape == (1, -(-frames // 4))


def test_above_whisper_a_padded_batch_gives_each_row_its_own_vectors():
    model = WhisperSemanticEncoder(ABOVE_WHISPER).eval()
    feats, lengths = torch.randn(3, 20, 80), torch.tensor([80, 41, 3])
    with torch.no_grad():
        together = model.encode(feats, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = model.encode(feats[row : row + 1, :, :length], lengths[row : row + 1])[0]
            assert torch.allclose(together[row, : len(alone)], alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=-1), torch.ones(3, 20))


def test_sizes_above_whisper_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="heads"):
        WhisperSemanticConfig(width=30, own_heads=4)
