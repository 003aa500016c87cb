"""The language model behind Triton: a thin shim over the model that also runs in process."""

import triton_python_backend_utils  # noqa: F401  first: it makes the environment's packages known

from services.llm.worker import make_model
from shared.inference.shim import shim
from shared.service import ServiceSettings

TritonPythonModel = shim(
    lambda device: make_model(ServiceSettings().model_copy(update={"device": device})), concurrent=True
)
