"""The host's frequency if KVM does not report it, and whether its TSC is stable."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from tscwatch.host import tsc
from tscwatch.host.tsc import _is_stable
from tscwatch.linux import kvm


@pytest.mark.parametrize(
    ("available", "stable"),
    [
        ("tsc hpet acpi_pm", True),
        ("kvm-clock tsc acpi_pm", True),
        ("hyperv_clocksource_tsc_page acpi_pm", True),
        ("hpet acpi_pm", False),
        ("kvm-clock acpi_pm", False),
        ("", True),  # not known
    ],
)
def test_the_kernel_no_longer_offers_a_tsc_that_is_unstable(available: str, stable: bool) -> None:
    assert _is_stable(available.split()) is stable


@pytest.mark.parametrize(
    ("answers", "expected"),
    [({"vm": 7}, (7, True)), ({"vcpu": 5}, (5, True)), ({}, (None, True))],
)
def test_the_frequency_is_read_from_a_vcpu_if_the_vm_reports_none(
    answers: dict[str, int], expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure is kept too; otherwise each second would create another VM."""
    created: list[str] = []

    def ioctl(file: object, command: int, _argument: int) -> int:
        if command == kvm.CHECK_EXTENSION:
            return 1
        if command in (kvm.CREATE_VM, kvm.CREATE_VCPU):
            created.append("vm" if command == kvm.CREATE_VM else "vcpu")
            return os.open("/dev/null", os.O_RDONLY)
        if created[-1] not in answers:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        return answers[created[-1]]

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(kvm, "DEV_KVM", Path("/dev/null"))
    tsc._read_once.cache_clear()
    try:
        assert tsc._read_from_kvm() == tsc._read_from_kvm() == expected
    finally:
        tsc._read_once.cache_clear()
    assert created.count("vm") == 1
