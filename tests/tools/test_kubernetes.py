"""The manifests in ``deploy/kubernetes``, rendered by kubectl and read by other programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.lab_vm import ROOT
from tests.support.prometheus import DEPLOY

KUBECTL = ROOT / ".lab/kubectl/usr/bin/kubectl"
VALIDATE = Path(sys.executable).with_name("kubernetes-validate")
OVERLAYS = ("base", "overlays/kubevirt", "overlays/openshift")
OLDEST = "1.30"
"""The first release with ``appArmorProfile``."""
UNKNOWN = {"PodMonitor", "PrometheusRule", "SecurityContextConstraints"}
"""What Kubernetes itself does not define."""


def rendered(overlay: str) -> str:
    command = [str(KUBECTL), "kustomize", str(DEPLOY / "kubernetes" / overlay)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return result.stdout


def manifests(overlay: str) -> dict[str, Any]:
    """Return the manifests by kind; a second one of a kind by kind and name."""
    found: dict[str, Any] = {}
    for manifest in yaml.safe_load_all(rendered(overlay)):
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        found[f"{kind} {name}" if kind in found else kind] = manifest
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_accepts_them(overlay: str, tmp_path: Path) -> None:
    file = tmp_path / "rendered.yaml"
    file.write_text(rendered(overlay))
    for version in ([], ["-k", OLDEST]):
        checked = subprocess.run(
            [str(VALIDATE), "--strict", *version, str(file)],
            capture_output=True,
            text=True,
            check=False,
        )
        lines = (checked.stdout + checked.stderr).splitlines()
        assert checked.returncode == 0, lines
        others = [line for line in lines if not line.startswith("INFO")]
        assert len([line for line in lines if "passed for resource daemonset" in line]) == 1
        assert [line for line in others if not any(f"kind {k} " in line for k in UNKNOWN)] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_is_in_one_namespace(overlay: str) -> None:
    found = manifests(overlay)
    for kind, manifest in found.items():
        if kind not in ("Namespace", "SecurityContextConstraints"):
            assert manifest["metadata"]["namespace"] == found["Namespace"]["metadata"]["name"]


@pytest.mark.parametrize("overlay", ["overlays/kubevirt", "overlays/openshift"])
def test_kubevirts_nodes_are_selected_while_virt_handler_restarts(overlay: str) -> None:
    """virt-handler sets the label to false whenever it stops; the guests go on running."""
    pod = manifests(overlay)["DaemonSet"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"kubernetes.io/arch": "amd64"}
    expression = {"key": "kubevirt.io/schedulable", "operator": "Exists"}
    terms = {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": terms}
    assert pod["affinity"] == {"nodeAffinity": required}


def test_kubevirt_permits_kvm() -> None:
    pod = manifests("overlays/kubevirt")["DaemonSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["devices.kubevirt.io/kvm"] == "1"
    assert "memory" in container["resources"]["limits"]
    assert "/dev/kvm" not in str([container["volumeMounts"], pod["volumes"]])


def test_openshift_grants_what_the_pod_requests() -> None:
    found = manifests("overlays/openshift")
    scc, pod = found["SecurityContextConstraints"], found["DaemonSet"]["spec"]["template"]["spec"]
    context = pod["containers"][0]["securityContext"]
    namespace, account = found["Namespace"]["metadata"]["name"], pod["serviceAccountName"]
    assert scc["users"] == [f"system:serviceaccount:{namespace}:{account}"]
    assert context["seLinuxOptions"] == {"type": "spc_t"}
    assert context["capabilities"]["add"] == scc["allowedCapabilities"]
    kinds = {key for volume in pod["volumes"] for key in volume if key != "name"}
    assert kinds <= set(scc["volumes"])


def test_prometheus_accepts_the_rules(tmp_path: Path) -> None:
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump(manifests("base")["PrometheusRule"]["spec"]))
    checked = subprocess.run(
        ["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
