"""Command lines as libvirt, Proxmox and people write them, and what else identifies a VMM."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tscwatch.model import Guest
from tscwatch.vmm import identify

UUID = "6e0b1d3a-5a43-4a4c-9a0e-0d6a4c3f7b11"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            [
                "/usr/bin/qemu-system-x86_64",
                "-name",
                "guest=web,debug-threads=on",
                "-S",
                "-machine",
                "pc-q35-7.2,usb=off,accel=kvm",
                "-cpu",
                "host,tsc-frequency=2500000000",
                "-uuid",
                UUID,
                "-incoming",
                "defer",
            ],
            Guest(1, "qemu", "web", UUID, "pc-q35-7.2", 2_500_000, True),
        ),
        (
            [
                "/usr/bin/kvm",
                "-id",
                "100",
                "-name",
                "vm100,debug-threads=on",
                "-smbios",
                f"type=1,uuid={UUID}",
                "-machine",
                "type=q35+pve0",
            ],
            Guest(1, "qemu", "vm100", None, "q35+pve0"),
        ),
        (["/usr/libexec/qemu-kvm", "--name=x", "--name", "plain"], Guest(1, "qemu", "plain")),
        (["qemu-system-x86_64", "-name", "a,,b"], Guest(1, "qemu", "a,b")),
        (
            ["qemu-system-x86_64", "-cpu", "qemu64,tsc-freq=2.5G"],
            Guest(1, "qemu", tsc_khz=2_500_000),
        ),
        (["qemu-system-x86_64", "-cpu", "qemu64,tsc-frequency=0"], Guest(1, "qemu")),
        (["qemu-system-x86_64", "-name"], Guest(1, "qemu")),
        (["/usr/bin/cloud-hypervisor", "-name", "no"], Guest(1, "cloud-hypervisor")),
        (["/usr/sbin/libvirtd"], Guest(1, "libvirtd")),
    ],
)
def test_known_forms(argv: list[str], expected: Guest) -> None:
    assert identify(1, argv) == expected


def test_a_process_that_is_gone_is_known_by_its_comm() -> None:
    assert identify(1, [], "qemu-system-x86") == Guest(1, "qemu")
    assert identify(1, [], "cloud-hyperviso") == Guest(1, "cloud-hypervisor")
    assert identify(1, [], "") == Guest(1, "unknown")


@given(st.lists(st.text()))
def test_no_command_line_breaks_it(arguments: list[str]) -> None:
    guest = identify(1, ["qemu-system-x86_64", *arguments])
    assert guest.vmm == "qemu"
    assert len(guest.name or "") <= 200
