"""How the reward model is served by a model server: its tensors, batches and limits."""

from shared.inference.repository import ModelSpec, Tensor

SPEC = ModelSpec(
    name="reward",
    inputs={"prompt": Tensor("INT64", (-1,)), "mixed": Tensor("INT32", (-1,))},
    outputs={"scores": Tensor("FP32", (-1,)), "score": Tensor("FP32", ())},
)
