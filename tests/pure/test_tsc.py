"""Whether this host's TSC can be believed, from the kernel's list of clocksources."""

from __future__ import annotations

import pytest

from tscwatch.host.tsc import _is_stable


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
