"""The flow-matching decoder, audio tokens to mel: `flow.Flow` is the model, `stream.FlowStream` one stream."""

from shared.models.flow.cfm import FlowTraining, flow_noise
from shared.models.flow.dit import DiTConfig
from shared.models.flow.encoder import EncoderConfig
from shared.models.flow.flow import Flow, FlowConfig, FlowLoss
from shared.models.flow.stream import FlowStream, FlowVoice, read_voice

__all__ = [
    "DiTConfig",
    "EncoderConfig",
    "Flow",
    "FlowConfig",
    "FlowLoss",
    "FlowStream",
    "FlowTraining",
    "FlowVoice",
    "flow_noise",
    "read_voice",
]
