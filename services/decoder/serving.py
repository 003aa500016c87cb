"""How the decoder is served by a model server: its tensors, batches and limits."""

from shared.inference.repository import ModelSpec, Tensor

SPEC = ModelSpec(
    name="decoder",
    inputs={
        "mixed": Tensor("INT32", (-1,)),
        "prompt_mixed": Tensor("INT32", (-1,)),
        "prompt_mel": Tensor("FP32", (-1, 80)),
        "speaker_embedding": Tensor("FP32", (192,)),
    },
    optional=("prompt_mixed", "prompt_mel", "speaker_embedding"),  # later chunks of a session go without
    outputs={"audio": Tensor("FP32", (-1,))},
    streams=True,
)
