"""Whose guest a VM is, from command lines and from libvirt's status files, also hostile ones."""

from __future__ import annotations

import time
from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tscwatch.model import Owner
from tscwatch.owner import of_guest
from tscwatch.vmm import identify

NOVA = """<nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">
  <nova:package version="25.1.0"/>
  <nova:name>web &amp; shop</nova:name>
  <nova:flavor name="m1.small"><nova:memory>512</nova:memory></nova:flavor>
  <nova:owner>
    <nova:user uuid="0f1e">ann</nova:user>
    <nova:project uuid="9a8b">sales</nova:project>
  </nova:owner>
</nova:instance>"""
KUBEVIRT = '<kubevirt xmlns="http://kubevirt.io"><uid/></kubevirt>'
SMBIOS = ("-smbios", "type=1,manufacturer=KubeVirt,product=None,family=KubeVirt")


def status(metadata: str, pid: int = 7, head: str = "") -> bytes:
    """Return a status file as libvirt writes it, with the metadata of a domain."""
    return f"""<!--
WARNING: THIS IS AN AUTO-GENERATED FILE.
-->
{head}
<domstatus state='running' reason='booted' pid='{pid}'>
  <qemuCaps><flag name='kvm'/></qemuCaps>
  <domain type='kvm' id='1'>
    <name>ignored</name>
    <metadata>{metadata}</metadata>
    <devices><name>ignored</name></devices>
  </domain>
</domstatus>""".encode()


def owner(*argv: str, file: bytes = b"", pids: tuple[str, ...] = ("7",)) -> Optional[Owner]:
    return of_guest(identify(7, argv), argv[1:], file, pids)


def qemu(name: str, *arguments: str, file: bytes = b"") -> Optional[Owner]:
    return owner("/usr/bin/qemu-system-x86_64", "-name", f"guest={name}", *arguments, file=file)


def test_nova_names_its_instance_and_the_project() -> None:
    expected = Owner("openstack", name="web & shop", project="sales", flavor="m1.small")
    assert qemu("instance-0000012a", file=status(NOVA)) == expected
    older = NOVA.replace("nova/1.1", "nova/1.0")
    assert qemu("instance-0000012a", file=status(KUBEVIRT + older)) == expected


def test_a_project_without_a_name_has_its_id() -> None:
    nameless = NOVA.replace(">sales<", "><")
    found = qemu("instance-0000012a", file=status(nameless))
    assert found == Owner("openstack", "", "web & shop", "9a8b", flavor="m1.small")


def test_kubevirt_names_the_namespace_and_the_vmi() -> None:
    expected = Owner("kubevirt", "shop", "db-1.a")
    assert qemu("shop_db-1.a", file=status(KUBEVIRT)) == expected
    assert qemu("shop_db-1.a", *SMBIOS) == expected


@pytest.mark.parametrize("name", ["shop_db", "a_b_c", "_db", "shop_", "Shop_db", "shop", "a" * 300])
def test_a_name_alone_is_no_proof_of_kubevirt(name: str) -> None:
    assert qemu(name) is None
    assert qemu(name, file=status("")) is None
    assert qemu(name, "-smbios", "type=1,product=NoKubeVirt,family=KubeVirtual") is None
    if name != "shop_db":
        assert qemu(name, *SMBIOS) is None


def test_metadata_counts_in_its_place_and_in_its_namespace_only() -> None:
    for metadata in (
        NOVA.replace("openstack.org", "example.org"),
        f"<other>{NOVA}</other>",
        f"</metadata><description>{NOVA}</description><metadata>",
        KUBEVIRT.replace("kubevirt.io", "kubevirt.example"),
    ):
        assert qemu("shop_db", file=status(metadata)) is None
    second = f"<metadata>{NOVA}</metadata><devices>".encode()
    after_it = status("").replace(b"<devices>", second)
    assert qemu("shop_db", file=after_it) is None


def test_a_file_of_another_process_does_not_count() -> None:
    assert qemu("web", file=status(NOVA, pid=8)) is None
    assert qemu("web", file=status(NOVA).replace(b" pid='7'", b"")) is None
    argv = ("qemu-system-x86_64", "-name", "web")
    assert owner(*argv, file=status(NOVA), pids=("2024", "7")) is not None  # in a container
    assert owner(*argv, file=status(NOVA), pids=()) is None


def test_proxmox_names_the_vmid() -> None:
    argv = ("/usr/bin/kvm", "-id", "100", "-name", "db,debug-threads=on")
    assert owner(*argv) == Owner("proxmox", name="db", vmid="100")
    assert owner("/usr/bin/kvm", "-id", "1" * 50, "-name", "db") is None
    assert owner("/usr/bin/kvm", "-name", "db", "-id") is None


@pytest.mark.parametrize("arguments", [("--id", "vm-1"), ("--id=vm-1", "--start-time-us=1")])
def test_firecracker_has_an_id(arguments: tuple[str, ...]) -> None:
    assert owner("/firecracker", *arguments) == Owner("firecracker", name="vm-1")


def test_a_vm_without_a_mark_has_no_owner() -> None:
    assert owner("/firecracker", "--api-sock", "x") is None
    assert owner("/firecracker", "--id", "a\nb") is None
    assert owner("cloud-hypervisor", "--id", "vm-1") is None
    assert owner("qemu-system-x86_64", "-uuid", "100") is None
    assert owner(file=status(NOVA)) is None


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10 if n else "ha"}">' for n in range(10))


@pytest.mark.parametrize(
    "file",
    [
        status(NOVA.replace("sales", "&l9;"), head=f"<!DOCTYPE domstatus [{LAUGHS}]>"),
        status(NOVA, head="<!DOCTYPE domstatus>"),
        status(NOVA.replace("sales", "&unknown;")),
        status("<a>" * 60_000 + NOVA + "</a>" * 60_000),
        status("<a/>" * 60_000 + NOVA),
        status(NOVA.replace("sales", "\x1b")),
        status(NOVA).replace(b"sales", b"\xff"),
        status(NOVA).replace(b"<domain", b"<domain <"),
        b"\0" * 1000,
        b"<domstatus pid='7'>" + b"<",
    ],
)
def test_a_hostile_file_has_no_owner(file: bytes) -> None:
    assert qemu("web", file=file) is None


SIZE = 1 << 18  # what is read of a file


@pytest.mark.parametrize(
    "metadata",
    [
        NOVA.replace("sales", "s" + "<!---->s" * (SIZE // 8)),
        f'<a xmlns="{"u" * (SIZE // 2)}">' + "<a/>" * (SIZE // 8) + f"</a>{NOVA}",
        f"<{'t' * (SIZE // 2)}>" + "<a/>" * (SIZE // 8) + f"</{'t' * 9}>",
        "<a>" + "".join(f"<a x{n}=''/>" for n in range(SIZE // 14)) + f"</a>{NOVA}",
        "<a " + " ".join(f"x{n}=''" for n in range(SIZE // 10)) + f"/>{NOVA}",
        "&#65;" * (SIZE // 5),
        "<a>" * (SIZE // 3),
    ],
)
def test_no_file_takes_long(metadata: str) -> None:
    begin = time.process_time()
    found = qemu("web", file=status(metadata))
    assert time.process_time() - begin < 0.5
    assert found is None or len(found.project) <= 200


def test_names_are_bounded_and_in_one_line() -> None:
    long = NOVA.replace("web &amp; shop", f" a\n\tb{'c' * 500}").replace("sales", "p" * 500)
    found = qemu("web", file=status(long))
    assert found is not None
    assert found.name.startswith("a bcc")
    assert (len(found.name), len(found.project)) == (200, 200)


def test_the_beginning_of_a_file_is_enough() -> None:
    whole = status(NOVA)
    assert qemu("web", file=whole[: whole.index(b"<devices>")]) is not None


def test_no_encoding_but_libvirts_is_used() -> None:
    file = b"<?xml version='1.0' encoding='zip'?>" + status(NOVA)
    assert qemu("web", file=file) is not None


@given(st.binary(), st.binary(), st.lists(st.text(max_size=20)))
def test_nothing_breaks_it(before: bytes, inside: bytes, arguments: list[str]) -> None:
    qemu("web", *arguments, file=before)
    qemu("web", *arguments, file=status(NOVA).replace(b"sales", inside))
    owner("firecracker", *arguments)
