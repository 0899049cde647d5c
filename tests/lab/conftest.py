from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.support.lab_vm import SCALING_MODULE


@pytest.fixture(scope="module")
def scaling() -> Iterator[None]:
    """Make KVM believe that the hardware scales the TSC.

    The emulated CPU does not, so a guest itself does not see the rate.  All that KVM computes from
    it is as on a host that scales: ratios, offsets, its count and its master clock.
    """
    subprocess.run(["insmod", str(SCALING_MODULE)], check=True)
    yield
    subprocess.run(["rmmod", SCALING_MODULE.stem], check=True)
