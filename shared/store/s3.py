"""An ArtifactStore in a bucket of any S3 server (MinIO, SeaweedFS, AWS), through the minio client.

An object becomes visible whole when its upload ends. The hash of its content travels as the object's metadata, so it
is computed before the upload: a stream is written to a temporary file first.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from io import BytesIO, RawIOBase
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qs, unquote, urlsplit

import urllib3
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.deleteobjects import DeleteObject
from minio.error import MinioException, S3Error
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule
from urllib3.exceptions import HTTPError

from shared.errors import UserError
from shared.store.port import ArtifactInfo, ArtifactNotFound, InvalidKey, StoreUnavailable, check_key

BLOCK = 1 << 20
MEMORY_MAX = 8 << 20
PART_SIZE = 16 << 20
SHA256_HEADER = "x-amz-meta-sha256"
ABSENT = {"NoSuchKey", "NoSuchObject", "NoSuchBucket", "ResourceNotFound"}


def connect(url: str) -> S3Store:
    """s3://key:secret@host:port/bucket[?region=...&public=https://files.example.org]; s3+http:// goes without TLS."""
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    bucket = parts.path.strip("/")
    if not parts.hostname or not bucket:
        raise UserError(f"{parts.scheme}://{parts.hostname or ''} names no server and bucket.",
                        "Write s3://key:secret@host:port/bucket.")  # fmt: skip
    return S3Store(
        endpoint=parts.netloc.rpartition("@")[2],
        bucket=bucket,
        access_key=unquote(parts.username or ""),
        secret_key=unquote(parts.password or ""),
        secure=parts.scheme == "s3",
        region=query.get("region", ["us-east-1"])[0],
        public_url=query.get("public", [None])[0],
    )


class S3Store:
    """An ArtifactStore in `bucket`. Presigned URLs name `public_url` where clients reach the server by another name."""

    def __init__(
        self,
        endpoint: str,
        bucket: str,
        *,
        access_key: str,
        secret_key: str,
        secure: bool = True,
        region: str = "us-east-1",
        public_url: str | None = None,
    ) -> None:
        self._bucket = bucket
        self._endpoint = endpoint
        keys: dict[str, Any] = {"access_key": access_key or None, "secret_key": secret_key or None, "region": region}
        pool = urllib3.PoolManager(
            maxsize=16,
            timeout=urllib3.Timeout(connect=3.0, read=30.0),
            retries=urllib3.Retry(total=2, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504]),
        )
        self._client = Minio(endpoint=endpoint, secure=secure, http_client=pool, **keys)
        public = urlsplit(public_url or f"{'https' if secure else 'http'}://{endpoint}")
        self._signer = Minio(endpoint=public.netloc, secure=public.scheme == "https", **keys)

    def put(self, key: str, data: bytes | BinaryIO, *, content_type: str = "application/octet-stream") -> ArtifactInfo:
        check_key(key)
        digest, size = hashlib.sha256(), 0
        with tempfile.SpooledTemporaryFile(MEMORY_MAX) as whole:
            source = BytesIO(data) if isinstance(data, bytes) else data
            while block := source.read(BLOCK):
                digest.update(block)
                size += whole.write(block)
            whole.seek(0)
            with self._errors(key):
                self._client.put_object(
                    bucket_name=self._bucket,
                    object_name=key,
                    data=cast(BinaryIO, whole),
                    length=size,
                    content_type=content_type,
                    metadata={SHA256_HEADER: digest.hexdigest()},
                    part_size=PART_SIZE,
                )
        return ArtifactInfo(key, size, content_type, time.time(), digest.hexdigest())

    def get(self, key: str) -> bytes:
        with self.open(key) as stream:
            return stream.read()

    def open(self, key: str) -> BinaryIO:
        with self._errors(key):
            response = self._client.get_object(bucket_name=self._bucket, object_name=check_key(key))
        return cast(BinaryIO, _Stream(response))

    def stat(self, key: str) -> ArtifactInfo:
        with self._errors(key):
            found = self._client.stat_object(bucket_name=self._bucket, object_name=check_key(key))
        modified_at = found.last_modified.timestamp() if found.last_modified else 0.0
        return ArtifactInfo(
            key, found.size or 0, found.content_type or "", modified_at, (found.metadata or {}).get(SHA256_HEADER, "")
        )

    def list(self, prefix: str = "") -> Iterator[ArtifactInfo]:
        with self._errors(prefix):
            listed = self._client.list_objects(bucket_name=self._bucket, prefix=prefix, recursive=True)
            for found in listed:
                modified_at = found.last_modified.timestamp() if found.last_modified else 0.0
                yield ArtifactInfo(found.object_name or "", found.size or 0, found.content_type or "", modified_at)

    def delete(self, key: str) -> None:
        with self._errors(key):
            self._client.remove_object(bucket_name=self._bucket, object_name=check_key(key))

    def delete_prefix(self, prefix: str) -> int:
        if not prefix:
            raise InvalidKey("Deleting everything needs a prefix.", "Name what should go, such as jobs/.")
        return self._remove([info.key for info in self.list(prefix)])

    def expire(self, prefix: str, older_than_s: float) -> int:
        limit = time.time() - older_than_s
        return self._remove([info.key for info in self.list(prefix) if info.modified_at <= limit])

    def presign_get(self, key: str, *, expires_s: int = 900) -> str:
        return self._signer.presigned_get_object(
            bucket_name=self._bucket, object_name=check_key(key), expires=timedelta(seconds=expires_s)
        )

    def presign_put(self, key: str, *, expires_s: int = 900) -> str:
        return self._signer.presigned_put_object(
            bucket_name=self._bucket, object_name=check_key(key), expires=timedelta(seconds=expires_s)
        )

    def ping(self) -> None:
        with self._errors("ping"):
            if not self._client.bucket_exists(bucket_name=self._bucket):
                raise StoreUnavailable(f"There is no bucket {self._bucket} at {self._endpoint}.", "Make it first.")

    def create_bucket(self, expire_days: dict[str, int] | None = None) -> None:
        """Make the bucket if it is missing, and let objects below each prefix expire after some days."""
        with self._errors(self._bucket):
            if not self._client.bucket_exists(bucket_name=self._bucket):
                self._client.make_bucket(bucket_name=self._bucket)
            if expire_days:
                rules = [
                    Rule(status=ENABLED, rule_id=f"expire-{prefix.strip('/').replace('/', '-')}",
                         rule_filter=Filter(prefix=prefix), expiration=Expiration(days=days))
                    for prefix, days in expire_days.items()
                ]  # fmt: skip
                self._client.set_bucket_lifecycle(bucket_name=self._bucket, config=LifecycleConfig(rules))

    def _remove(self, keys: Sequence[str]) -> int:
        with self._errors("the listed objects"):
            failed = list(
                self._client.remove_objects(
                    bucket_name=self._bucket, delete_object_list=[DeleteObject(key) for key in keys]
                )
            )
        if failed:
            raise StoreUnavailable(f"{len(failed)} of {len(keys)} objects were not removed: {failed[0].message}.")
        return len(keys)

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except S3Error as error:
            if error.code in ABSENT:
                raise ArtifactNotFound(f"There is no artifact {key}.") from error
            raise StoreUnavailable(f"The store at {self._endpoint} refused {key}: {error.code}.") from error
        except (MinioException, HTTPError, OSError) as error:
            raise StoreUnavailable(
                f"The store at {self._endpoint} did not answer: {error}.", "Check that it runs."
            ) from error


class _Stream(RawIOBase):
    """A response's body as a file that gives its connection back when it is closed."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        try:
            return cast(bytes, self._response.read(None if size is None or size < 0 else size))
        except HTTPError as error:
            raise StoreUnavailable(f"The store broke a download off: {error}.") from error

    def close(self) -> None:
        if not self.closed:
            self._response.close()
            self._response.release_conn()
        super().close()
