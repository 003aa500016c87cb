"""The Python client of an editx gateway, synchronous and asynchronous. Needs httpx and nothing else of editx.

>>> from editx_client import Client
>>> with Client("http://localhost:8000") as client:  # doctest: +SKIP
...     job = client.edit("in.wav", type="emotion", detail="happy", text="What the recording says.")
...     client.save(job, "out.wav")
"""

from editx_client.aio import AsyncClient
from editx_client.calls import Source
from editx_client.client import Client
from editx_client.errors import ApiError, ClientError, JobFailed, Unreachable
from editx_client.models import Audio, Batch, Event, Job, JobError, JobPage, Step, Upload, Voice
from editx_client.retries import Retries

__all__ = [
    "ApiError",
    "AsyncClient",
    "Audio",
    "Batch",
    "Client",
    "ClientError",
    "Event",
    "Job",
    "JobError",
    "JobFailed",
    "JobPage",
    "Retries",
    "Source",
    "Step",
    "Unreachable",
    "Upload",
    "Voice",
]
