"""Whose guest a VM is: the real libvirt, and QEMU in namespaces as in a container."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.live.test_unit_file import confined
from tests.pure.test_owner import KUBEVIRT, NOVA, SMBIOS, status
from tests.support import libvirt
from tests.support.guests import PATIENCE_S, QEMU, Guest, wait_for
from tests.support.observer import Observer, run

OF_NOVA = {
    "platform": "openstack",
    "name": "web & shop",
    "project": "sales",
    "flavor": "m1.small",
}
OF_KUBEVIRT = {"platform": "kubevirt", "namespace": "shop", "name": "db"}


def owners(observer: Observer, vm: str) -> list[Any]:
    """Return the owner in each call of a VM."""
    return [call["owner"] for call in observer.calls(vm)]


def series(observer: Observer, vm: str) -> list[str]:
    """Return the labels of a VM's owner."""
    return [labels for labels in observer.series("vm_owner_info") if f'vm="{vm}"' in labels]


def rows(observer: Observer, vm: str) -> list[dict[str, Any]]:
    """Return what ``/vms`` has of a VM."""
    with urllib.request.urlopen(f"{observer.address}/vms", timeout=PATIENCE_S) as answer:
        return [row for row in json.load(answer) if row["vm"] == vm]


@contextmanager
def container(name: str, *preparation: str, arguments: tuple[str, ...] = ()) -> Iterator[None]:
    """Run QEMU as process 1 of a pid namespace, with a ``/run`` of its own.

    :param preparation: shell commands that fill ``/run``.
    """
    script = "\n".join(("set -e", "mount -t tmpfs none /run", *preparation, 'exec "$@"'))
    namespaces = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
    machine = ("-M", "q35,accel=kvm", "-cpu", "qemu64", "-display", "none", "-nodefaults")
    qemu = (QEMU, *machine, "-name", f"guest={name}", "-S", *arguments)
    with subprocess.Popen([*namespaces, "sh", "-c", script, "sh", *qemu]) as process:
        try:
            yield
        finally:
            process.kill()


def test_nova_under_the_real_libvirt(observer: Observer, tmp_path: Path) -> None:
    """The owner is known at the first call, and shown wherever the guest is."""
    name = f"instance-{tmp_path.parent.name}"
    with libvirt.daemons(tmp_path), libvirt.domain(tmp_path, name, NOVA):
        libvirt.virsh("start", name)
        observer.wait_for_calls(name, 6)
        assert all(owner == OF_NOVA for owner in owners(observer, name))
        labels = 'name="web & shop",namespace="",platform="openstack",project="sales"'
        assert series(observer, name) == [f'{labels},vm="{name}",vmid=""']
        assert [row["owner"] for row in rows(observer, name)] == [OF_NOVA]
        assert "sales/web & shop" in run("top", "--url", observer.address).stdout
    wait_for(lambda: not series(observer, name), "the end of its series")


def test_an_owner_is_the_one_of_the_first_sight(tmp_path: Path) -> None:
    """A change of the metadata is seen by a tscwatch that starts after it."""
    name = "renamed"
    uri = "http://openstack.org/xmlns/libvirt/nova/1.1"
    change = ("--live", "--key", "nova", "--set", "<instance><name>other</name></instance>")
    with libvirt.daemons(tmp_path), libvirt.domain(tmp_path, name, NOVA):
        libvirt.virsh("start", name)
        with Observer(tmp_path, "--source", "ftrace") as observer:
            wait_for(lambda: bool(rows(observer, name)), "the guest")
            libvirt.virsh("metadata", name, uri, *change)
            assert [row["owner"] for row in rows(observer, name)] == [OF_NOVA]
        with Observer(tmp_path, "--source", "ftrace") as observer:
            wait_for(lambda: bool(rows(observer, name)), "the guest")
            (row,) = rows(observer, name)
            assert row["owner"] == {"platform": "openstack", "name": "other"}


def test_a_guest_of_libvirt_without_metadata_has_no_owner(
    observer: Observer, tmp_path: Path
) -> None:
    name = "plain_guest"
    with libvirt.daemons(tmp_path), libvirt.domain(tmp_path, name):
        libvirt.virsh("start", name)
        observer.wait_for_calls(name, 6)
        assert not any(owners(observer, name))
        assert series(observer, name) == []


def test_libvirt_in_the_container_of_its_guest(observer: Observer, tmp_path: Path) -> None:
    """As in KubeVirt's virt-launcher: libvirt has recorded the pid of its own namespace."""
    file = tmp_path / "status.xml"
    file.write_bytes(status(KUBEVIRT, pid=1))
    directory = "/run/libvirt/qemu/run"
    copy = f"mkdir -p {directory}\ncp {file} {directory}/shop_db.xml"
    with container("shop_db", copy):
        observer.wait_for_calls("shop_db", 3)
        assert all(owner == OF_KUBEVIRT for owner in owners(observer, "shop_db"))
    with container("shop_other", copy):
        observer.wait_for_calls("shop_other", 3)
        assert not any(owners(observer, "shop_other"))
    with container("shop_web", arguments=SMBIOS):
        observer.wait_for_calls("shop_web", 3)
        assert all(
            owner == {**OF_KUBEVIRT, "name": "web"} for owner in owners(observer, "shop_web")
        )


def test_the_units_capabilities_suffice_for_it(tmp_path: Path) -> None:
    """libvirt in a container runs as another user, and nobody else may read its files."""
    file = tmp_path / "status.xml"
    file.write_bytes(status(KUBEVIRT, pid=1))
    directory = "/run/libvirt/qemu/run"
    copy = f"mkdir -p {directory}\ncp {file} {directory}/shop_db.xml"
    private = f"chown -R 107:107 {directory}\nchmod -R go= {directory}"
    with (
        Observer(tmp_path, "--json", "--source", "ftrace", within=confined()) as observer,
        container("shop_db", copy, private),
    ):
        observer.wait_for_calls("shop_db", 3)
        assert all(owner == OF_KUBEVIRT for owner in owners(observer, "shop_db"))


def test_a_container_cannot_show_what_the_host_has(observer: Observer, tmp_path: Path) -> None:
    """Neither a link in its root nor the name of a guest of the host makes it another's."""
    file = tmp_path / "status.xml"
    file.write_bytes(status(NOVA, pid=1))
    link = f"mkdir -p /run/libvirt/qemu\nln -s {file} /run/libvirt/qemu/linked.xml"
    with container("linked", link):
        observer.wait_for_calls("linked", 3)
        assert not any(owners(observer, "linked"))
    with libvirt.daemons(tmp_path), libvirt.domain(tmp_path, "copied", NOVA):
        libvirt.virsh("start", "copied")
        observer.wait_for_calls("copied", 6)
        with Guest(tmp_path, "copied") as guest:
            wait_for(
                lambda: any(call["pid"] == guest.pid for call in observer.calls()), "its calls"
            )
            calls = [call for call in observer.calls() if call["pid"] == guest.pid]
            assert not any(call["owner"] for call in calls)


HANGING = (
    "mkdir -p /run/libvirt",
    "exec 3<>/dev/fuse",
    "mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 none /run/libvirt",
)


@pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="there is no /dev/fuse")
def test_a_file_system_that_never_answers(observer: Observer, tmp_path: Path) -> None:
    """The guest whose root has it is observed without an owner, and other guests as always."""
    with container("hangs", *HANGING):
        observer.wait_for_calls("hangs", 3)
        begin = time.monotonic()
        with Guest(tmp_path, "beside"):
            observer.wait_for_calls("beside", 6)
        assert time.monotonic() - begin < 10
        assert not any(owners(observer, "hangs"))
