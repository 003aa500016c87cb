"""How the tokenizer is served by a model server: its tensors, batches and limits."""

from shared.inference.repository import ModelSpec, Tensor

SPEC = ModelSpec(
    name="tokenizer",
    inputs={"audio": Tensor("FP32", (-1,))},
    outputs={
        "linguistic": Tensor("INT32", (-1,)),
        "semantic": Tensor("INT32", (-1,)),
        "speaker_embedding": Tensor("FP32", (192,)),
        "prompt_mel": Tensor("FP32", (-1, 80)),
    },
)
