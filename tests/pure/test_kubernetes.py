"""The manifests in ``deploy/kubernetes`` match the systemd unit, the README and the image."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from deploy.container import image
from deploy.kubernetes import generate
from tests.support.container import CAPABILITIES
from tests.support.image import DEBUGFS, KVM, TRACEFS
from tscwatch import __version__, config

ROOT = Path(__file__).parents[2]
HERE = ROOT / "deploy/kubernetes"
UNIT = (ROOT / "deploy/systemd/tscwatch.service").read_text()
README = (ROOT / "README.md").read_text()


def manifest(path: str) -> Any:
    return yaml.safe_load((HERE / path).read_text())


DAEMONSET = manifest("base/daemonset.yaml")["spec"]
POD = DAEMONSET["template"]["spec"]
(CONTAINER,) = POD["containers"]


def setting(name: str) -> str:
    """Return a setting of the unit."""
    (value,) = re.findall(rf"(?m)^{name}=(.*)$", UNIT)
    return str(value)


def mebibytes(quantity: str) -> int:
    number, unit = quantity[:-2], quantity[-2:]
    assert unit == "Mi"
    return int(number)


def patience_s(probe: dict[str, int]) -> int:
    return probe["periodSeconds"] * probe["failureThreshold"]


def test_what_is_committed_is_what_is_generated() -> None:
    for path, content in generate.generated().items():
        assert (HERE / path).read_text() == content, "run make kubernetes"


def test_the_rights_are_those_of_the_unit() -> None:
    context = CONTAINER["securityContext"]
    names = [f"CAP_{name}" for name in context["capabilities"]["add"]]
    assert names == setting("CapabilityBoundingSet").split() == CAPABILITIES
    assert context["capabilities"]["drop"] == ["ALL"]
    assert (setting("NoNewPrivileges"), context["allowPrivilegeEscalation"]) == ("yes", False)
    assert (setting("ProtectSystem"), context["readOnlyRootFilesystem"]) == ("strict", True)
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert "privileged" not in context
    assert POD["hostPID"]
    assert not {"hostNetwork", "hostIPC"} & set(POD)


def test_openshift_permits_these_rights_and_no_others() -> None:
    scc = manifest("overlays/openshift/scc.yaml")
    context = CONTAINER["securityContext"]
    assert scc["allowedCapabilities"] == context["capabilities"]["add"]
    assert scc["seccompProfiles"] == ["runtime/default"]
    permitted = {key for key, value in scc.items() if key.startswith("allow") and value is True}
    assert permitted == {"allowHostPID", "allowHostDirVolumePlugin"}


def test_only_tracefs_and_a_small_tmp_can_be_written() -> None:
    hosts = {v["name"]: v["hostPath"]["path"] for v in POD["volumes"] if "hostPath" in v}
    assert set(hosts.values()) == {DEBUGFS, TRACEFS, str(KVM)}
    mounts = {mount["name"]: mount for mount in CONTAINER["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in POD["volumes"]}
    assert {name: mounts[name]["mountPath"] for name in hosts} == hosts
    writable = {m["mountPath"] for m in mounts.values() if not m.get("readOnly")}
    assert writable == {TRACEFS, "/tmp", str(KVM)}


def test_probes_are_as_patient_as_systemd() -> None:
    assert patience_s(CONTAINER["startupProbe"]) == int(setting("TimeoutStartSec"))
    assert patience_s(CONTAINER["livenessProbe"]) == int(setting("WatchdogSec"))
    for probe, path in (
        ("startupProbe", "/healthz"),
        ("livenessProbe", "/healthz"),
        ("readinessProbe", "/readyz"),
    ):
        assert CONTAINER[probe]["httpGet"] == {"path": path, "port": "metrics"}
        assert f"`{path}`" in README


def test_one_node_at_a_time_is_updated() -> None:
    assert DAEMONSET["updateStrategy"]["rollingUpdate"] == {"maxUnavailable": 1}


def test_memory_is_what_the_readme_states() -> None:
    resident = re.findall(r"(?m)^\| tscwatch, \w+ \|.*?\| [\d.]+ to ([\d.]+) MiB .*? \|", README)
    assert len(resident) == 2
    resources = CONTAINER["resources"]
    assert mebibytes(resources["requests"]["memory"]) > max(map(float, resident))
    limits = config.Config()
    of_vcpus = limits.max_vcpus * 1.2 / 1024
    assert mebibytes(resources["limits"]["memory"]) > max(map(float, resident)) + of_vcpus


def test_the_configuration_and_the_command_are_those_of_the_image() -> None:
    settings = config.load(HERE / "base/tscwatch.yaml")
    assert settings.address == "0.0.0.0"
    assert CONTAINER["ports"] == [{"name": "metrics", "containerPort": settings.port}]
    of_image = image.configuration("", "", __version__, "")["config"]
    assert CONTAINER["args"] == of_image["Cmd"]
    assert list(of_image["ExposedPorts"]) == [f"{settings.port}/tcp"]
    (entry,) = manifest("base/kustomization.yaml")["images"]
    assert (entry["name"], entry["newTag"]) == (CONTAINER["image"], __version__)


def test_prometheus_finds_the_pods_and_names_the_node() -> None:
    monitor = manifest("base/podmonitor.yaml")["spec"]
    assert monitor["selector"] == DAEMONSET["selector"]
    assert DAEMONSET["selector"]["matchLabels"] == DAEMONSET["template"]["metadata"]["labels"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] == CONTAINER["ports"][0]["name"]
    assert endpoint["honorLabels"]  # or the owner's namespace would be the pod's
    instance, pool = endpoint["relabelings"]
    assert instance["sourceLabels"] == ["__meta_kubernetes_pod_node_name"]
    assert (instance["targetLabel"], pool["targetLabel"]) == ("instance", "pool")


def test_the_readme_names_each_overlay_and_the_label() -> None:
    section = README.partition("\n## In Kubernetes\n")[2].partition("\n## ")[0]
    for path in (HERE / "overlays").iterdir():
        assert f"overlays/{path.name}" in section
    (label,) = (name for name in POD["nodeSelector"] if name.startswith("tscwatch/"))
    assert f"{label}=true" in section
    assert f"tscwatch:{__version__}" in section


def test_the_readmes_container_has_the_rights_of_the_pod_and_can_be_scraped() -> None:
    (command,) = re.findall(r"(?m)^podman run (?:.*\\\n)*.*$", README)
    words = shlex.split(command)
    assert words[-1].endswith(f"/tscwatch:{__version__}")
    options = list(zip(words, words[1:]))
    context = CONTAINER["securityContext"]
    added = [value for option, value in options if option == "--cap-add"]
    assert added == context["capabilities"]["add"]
    volumes = {value for option, value in options if option == "--volume"}
    assert volumes == {f"{TRACEFS}:{TRACEFS}", f"{DEBUGFS}:{DEBUGFS}:ro"}
    # The image's configuration is the default one: only the host itself can connect.
    assert config.Config().address == "127.0.0.1"
    assert {
        ("--pid", "host"),
        ("--network", "host"),
        ("--device", str(KVM)),
        ("--tmpfs", "/tmp"),
        ("--cap-drop", "all"),
        ("--ulimit", "memlock=-1"),
    } <= set(options)
    assert "--read-only" in words


def test_the_readme_names_what_the_images_health_check_reads() -> None:
    *_, program = image.configuration("", "", __version__, "")["config"]["Healthcheck"]["Test"]
    (url,) = re.findall(r"'(http://.*)'", program)
    assert f"`{url}`" in README
