"""The flow: audio-token pairs, a reference mel and a speaker embedding to a mel at 50 frames per second.

Everything is batched with lengths, so a batch of N equals N runs. Knows nothing about how tokens are interleaved, which
files the weights come from, or what makes a waveform of the mel. (Decoder of arXiv 2511.03601.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.models.flow.cfm import CFM, Conditions, FlowTraining, RoughGuidance, masked_error
from shared.models.flow.dit import DiT, DiTConfig
from shared.models.flow.embedding import DualCodebookEmbedding
from shared.models.flow.encoder import Encoder, EncoderConfig

# Structure that the published configuration spells out and that this implementation fixes.
FIXED_ENCODER_FIELDS: Mapping[str, object] = {
    "input_layer": "linear",
    "pos_enc_layer_type": "rel_pos_espnet",
    "selfattention_layer_type": "rel_selfattn",
    "activation_type": "swish",
    "normalize_before": True,
}
Config = TypeVar("Config", EncoderConfig, DiTConfig)


@dataclass(frozen=True)
class FlowConfig:
    """Sizes of the flow; the defaults are those of the published checkpoint.

    `rough`, `longest_reference` and `voiced_rough` are this project's and absent from a published configuration: how
    sampling is held to the rough mel, how many token pairs of a reference the flow reads at most, None for all, and
    whether the rough mel, which knows no voice, is moved to that of the reference (`voice_shift`).
    """

    input_size: int = 512
    output_size: int = 80
    spk_embed_dim: int = 192
    vocab_size: int = 5121
    cfg_rate: float = 0.7
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    estimator: DiTConfig = field(default_factory=DiTConfig)
    rough: RoughGuidance | None = None
    longest_reference: int | None = None
    voiced_rough: bool = False

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> Self:
        """Read the `flow` section of cosyvoice.yaml. Raises ValueError where it asks for another structure."""
        encoder, decoder = section.get("encoder", {}), section.get("decoder", {})
        for name, only in FIXED_ENCODER_FIELDS.items():
            if encoder.get(name, only) != only:
                raise ValueError(f"flow.encoder.{name} is {encoder[name]!r}; only {only!r} is supported")
        if float(encoder.get("up_scale_factor", encoder.get("up_stride", 2))) != float(encoder.get("up_stride", 2)):
            raise ValueError("flow.encoder.up_scale_factor differs from up_stride; they must be equal")
        sizes = ("input_size", "output_size", "spk_embed_dim", "vocab_size")
        own = {name: section[name] for name in sizes if name in section}
        rough, longest = decoder.get("rough_guidance"), section.get("longest_reference")
        if longest is not None and int(longest) < 1:
            raise ValueError(f"flow.longest_reference is {longest}; it must be at least 1")
        return cls(
            **own,
            cfg_rate=float(decoder.get("inference_cfg_rate", cls.cfg_rate)),
            encoder=_pick(EncoderConfig, encoder),
            estimator=_pick(DiTConfig, decoder.get("estimator", {})),
            rough=None if rough is None else RoughGuidance(float(rough["width"]), float(rough["until"])),
            longest_reference=None if longest is None else int(longest),
            voiced_rough=bool(section.get("voiced_rough", False)),
        )


def _pick(kind: type[Config], section: Mapping[str, Any]) -> Config:
    return kind(**{entry.name: section[entry.name] for entry in fields(kind) if entry.name in section})


class FlowLoss(NamedTuple):
    """`total` is what to minimise; the parts are for the log."""

    total: Tensor
    cfm: Tensor
    prior: Tensor


def length_mask(lengths: Tensor, size: int) -> Tensor | None:
    """Lengths (B,) to a mask of real places (B, size), or None when every place is real (which runs faster)."""
    if bool((lengths == size).all()):
        return None
    return first_places(lengths, size)


def first_places(counts: Tensor, size: int) -> Tensor:
    """The first of `size` places, as many as counts (B,) say, (B, size) bool."""
    return torch.arange(size, device=counts.device) < counts[:, None]


QUIET_SHARE = 0.1
STANDS_OUT = (0.5, 1.25)
"""How far (nepers) the louder half of a bin's frames lies above its quietest tenth: in noise of 5 dB hardly 0.5, in a
clean recording nearly always more than 1.25."""


def voice_shift(rough: Tensor, mel: Tensor, frames: Tensor) -> Tensor:
    """How far a reference's mel (B, P, 80) lies from its rough one (B, P, 80), (B, 1, 80) float32: the mean over its
    louder frames among the first `frames` (B,), which most of speech is; zeros where there are none.

    The rough mel is of no voice in particular; moved by this it has the reference's timbre and channel. (Mean
    normalisation of recognisers' features, the other way round.) Bins that are full of noise, where nothing stands
    out, have none: what they hold is not the voice.
    """
    rough, mel = rough.float(), mel.float()
    inside = first_places(frames, mel.shape[1])
    levels, counts = mel.mean(-1), inside.sum(1)
    usual = (levels * inside).sum(1) / counts.clamp(min=1)
    loud = (inside & (levels >= usual[:, None]))[..., None]
    rough, loudest = ((part * loud).sum(1) / loud.sum(1).clamp(min=1) for part in (rough, mel))
    sorted_bins = mel.masked_fill(~inside[..., None], torch.inf).sort(1).values
    floor = sorted_bins[torch.arange(len(mel), device=mel.device), (QUIET_SHARE * counts).long()]
    low, high = STANDS_OUT
    share = ((loudest - floor - low) / (high - low)).clamp(0, 1)
    return ((loudest - rough) * share)[:, None]


class Flow(nn.Module):
    """Dual-codebook embedding, conformer encoder, projection to a rough mel, and conditional flow matching."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.input_embedding = DualCodebookEmbedding(config.vocab_size, config.input_size)
        self.spk_embed_affine_layer = nn.Linear(config.spk_embed_dim, config.output_size)
        self.encoder = Encoder(config.encoder)
        self.encoder_proj = nn.Linear(config.encoder.output_size, config.output_size)
        self.decoder = CFM(DiT(config.estimator), config.cfg_rate, config.rough)

    @property
    def frames_per_token(self) -> int:
        """Mel frames for each 25 Hz token pair."""
        return self.config.encoder.up_stride

    @property
    def lookahead(self) -> int:
        """Token pairs that a stream must know beyond the chunk that it makes."""
        return self.config.encoder.pre_lookahead_len

    def encode(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Token pairs (B, T, 2) with lengths (B,) to the rough mel mu (B, 2T, 80)."""
        hidden = self.encoder(self.input_embedding(tokens), length_mask(lengths, tokens.shape[1]))
        mu: Tensor = self.encoder_proj(hidden)
        return mu

    def speaker(self, embedding: Tensor) -> Tensor:
        """Speaker embeddings (B, 192) of any scale to (B, 80)."""
        affine = self.spk_embed_affine_layer
        out: Tensor = affine(F.normalize(embedding, dim=1).to(affine.weight.dtype))
        return out

    def shift(self, mu: Tensor, mel: Tensor, prompt_lengths: Tensor) -> Tensor:
        """What moves the rough mel to the voices of references, (B, 1, 80); zeros where the checkpoint asks for none.

        mu and mel (B, P, 80): rough mels and mels that begin with those of references of prompt_lengths (B,) frames.
        The last frames of a reference, which look ahead into what follows, have no say: a stream reads it before that.
        """
        if not self.config.voiced_rough:
            return mu.new_zeros(len(mu), 1, mu.shape[2])
        known = (prompt_lengths - self.lookahead * self.frames_per_token).clamp(min=0)
        return voice_shift(mu, mel, known).to(mu.dtype)

    @torch.inference_mode()
    def sample(
        self,
        tokens: Tensor,
        lengths: Tensor,
        prompt_mel: Tensor,
        prompt_lengths: Tensor,
        speaker: Tensor,
        noise: Tensor,
        *,
        steps: int = 10,
        cfg_rate: float | None = None,
        before_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """Mels of a batch, (B, 2T, 80) float32, the frames of the reference included.

        tokens (B, T, 2): those of the reference first; lengths (B,); prompt_mel (B, P, 80) at two frames per token of
        the reference with prompt_lengths (B,); speaker (B, 192); noise (B, 2T, 80) float32, see `flow_noise`. What lies
        beyond a length has no effect on what lies before it. cfg_rate None takes the checkpoint's. `before_step` is
        called before every step; what it raises ends the work.
        """
        mu = self.encode(tokens, lengths)
        frames = mu.shape[1]
        cond = F.pad(prompt_mel[:, :frames], (0, 0, 0, max(0, frames - prompt_mel.shape[1])))
        given = first_places(prompt_lengths, frames)
        mu = mu + self.shift(mu, cond, prompt_lengths)
        conditions = Conditions(mu, self.speaker(speaker), cond.to(mu.dtype) * given[..., None])
        mask = length_mask(lengths * self.frames_per_token, frames)
        mel: Tensor = self.decoder(noise, conditions, mask, steps, cfg_rate, before_step)
        return mel

    def loss(
        self,
        tokens: Tensor,
        lengths: Tensor,
        mel: Tensor,
        mel_lengths: Tensor,
        speaker: Tensor,
        *,
        dials: FlowTraining | None = None,
        generator: torch.Generator | None = None,
    ) -> FlowLoss:
        """Training loss of a batch: tokens (B, T, 2), lengths (B,), mel (B, F, 80), mel_lengths (B,), speaker (B, 192).

        Frames count where both the tokens and the mel have them. The reference is imitated by giving the first frames
        of the mel itself as the condition, at the rate and up to the share that `dials` say. A CPU `generator` makes
        the draws repeatable.
        """
        dials = dials or FlowTraining()
        mu = self.encode(tokens, lengths)
        frames = mu.shape[1]
        mel = F.pad(mel[:, :frames], (0, 0, 0, max(0, frames - mel.shape[1])))
        real = torch.minimum(lengths * self.frames_per_token, mel_lengths)
        mask = first_places(real, frames)
        share = torch.rand(len(mel), generator=generator) * dials.prompt_max_share
        share = share * (torch.rand(len(mel), generator=generator) < dials.prompt_rate)
        given = first_places((share.to(mel.device) * real).floor(), frames)
        cond = mel * given[..., None]
        conditions = Conditions(mu + self.shift(mu, cond, given.sum(1)), self.speaker(speaker), cond)
        cfm = self.decoder.loss(mel, mask, conditions, dials, generator)
        prior = masked_error(mu, mel, mask, dials.norm)
        return FlowLoss(cfm + dials.prior_weight * prior, cfm, prior)
