"""How the language model is served by a model server: its tensors and limits. It batches for itself."""

from shared.inference.repository import ModelSpec, Tensor

SPEC = ModelSpec(
    name="llm",
    inputs={
        "prompt": Tensor("INT64", (-1,)),
        "against": Tensor("INT64", (-1,)),
        "text": Tensor("INT32", (-1,)),
        "spoken": Tensor("INT32", (-1,)),
        "manner": Tensor("INT32", (-1,)),
    },
    outputs={
        "mixed": Tensor("INT32", (-1,)),
        "attempts": Tensor("INT32", ()),
        "collapsed": Tensor("BOOL", ()),
        "stretch": Tensor("FP32", ()),
    },
    optional=("against", "text", "spoken", "manner"),
    streams=True,
    max_batch={"cpu": 1, "gpu": 1},
    delay_us=0,
)
