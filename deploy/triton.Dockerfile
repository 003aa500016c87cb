# Triton Inference Server with the models of all services as thin shims over the same code.
FROM nvcr.io/nvidia/tritonserver:26.07-py3
WORKDIR /app
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY constraints constraints
COPY shared shared
COPY services services
COPY editx editx
COPY editx_client editx_client
COPY models models
RUN pip install --no-cache-dir --break-system-packages --constraint constraints/runtime.txt ".[stack]"
ENV PYTHONPATH=/app HOME=/tmp HF_HUB_OFFLINE=1
RUN python3 -m editx models write --to /repository
USER 1000
CMD ["tritonserver", "--model-repository=/repository", "--model-control-mode=explicit"]
