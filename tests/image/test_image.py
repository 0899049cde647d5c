"""The container image, run with runc beside real guests: ``make test-image``."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import image
from tests.support.container import CAPABILITIES
from tests.support.guests import PATIENCE_S, Guest, wait_for
from tests.support.image import DEBUGFS, HOST_PROCESSES, KVM, TRACEFS
from tests.support.observer import Observer
from tests.support.scenarios import boot, plug
from tscwatch import __version__

_names: list[str] = []


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the unpacked image; at the end, delete what a failed test has left running."""
    yield image.unpack(tmp_path_factory.mktemp("image"))
    for name in _names:
        subprocess.run(["runc", "delete", "--force", name], check=True)


def new_name() -> str:
    """Return a name for a container."""
    _names.append(f"tscwatch-image-{os.getpid()}-{len(_names)}")
    return _names[-1]


def observing(directory: Path, bundle: Path, *without: str) -> Observer:
    directory.mkdir()
    return Observer(directory, "--json", within=image.within(bundle, new_name(), *without))


def has_vm(observer: Observer, guest: Guest) -> bool:
    labels = rf'pid="{guest.pid}",.*vm="{guest.name}"'
    return re.search(rf"(?m)^tscwatch_vm_info{{.*{labels}", observer.metrics()) is not None


def test_guests_outside_are_seen_named_attributed_and_adopted(bundle: Path, tmp_path: Path) -> None:
    with Guest(tmp_path, "image-older") as older:
        older.start()
        with observing(tmp_path / "first", bundle) as first, Guest(tmp_path, "image-new") as new:
            (source,) = first.series("source_info")
            assert {'source="bcc"', 'program="packaged"'} <= set(source.split(","))
            wait_for(lambda: has_vm(first, older), "the guest that ran before")
            first.wait_for_calls("image-new", len(boot(2)))
            assert first.places("image-new") == boot(2)
            assert has_vm(first, new)
            new.start()
            older.plug()
            first.wait_for_calls("image-older", len(plug(2, "hotplug")))
            assert first.places("image-older") == plug(2, "hotplug")
            assert 'vm_tsc_spread_seconds{vm="image-older"}' in first.metrics()
            assert first.series("host_tsc_hertz")
            assert first.is_ready()
            assert first.stop() == 0
            assert "is missing" not in first.log.read_text()
            with observing(tmp_path / "second", bundle) as second:
                wait_for(lambda: has_vm(second, older) and has_vm(second, new), "the guests again")
                new.plug()
                second.wait_for_calls("image-new", len(plug(2, "hotplug")))
                assert second.places("image-new") == plug(2, "hotplug")
                assert 'vm_tsc_spread_seconds{vm="image-older"}' in second.metrics()
                assert second.losses() == []
                assert second.stop() == 0
    assert "Traceback" not in (tmp_path / "second/tscwatch.log").read_text()


@pytest.mark.parametrize("right", [*CAPABILITIES, DEBUGFS])
def test_it_names_a_right_without_which_it_sees_less(
    right: str, bundle: Path, tmp_path: Path
) -> None:
    with observing(tmp_path / "inside", bundle, right) as observer:
        log = observer.log.read_text()
        word = {DEBUGFS: "debugfs"}.get(right, f"{right} is missing")
        (line,) = [line for line in log.splitlines() if f"tscwatch: {word}" in line]
        assert "container" in line
        with Guest(tmp_path, "image-beside"):
            observer.wait_for_calls("image-beside", len(boot(2)))


@pytest.mark.parametrize(
    ("without", "status", "words"),
    [
        ([str(KVM)], 8, "in a container pass /dev/kvm in"),
        ([DEBUGFS, TRACEFS], 11, "tracefs is not mounted"),
        ([HOST_PROCESSES], 13, "hostPID: true in Kubernetes"),
    ],
)
def test_it_names_a_right_without_which_it_cannot_start(
    without: list[str], status: int, words: str, bundle: Path
) -> None:
    result = subprocess.run(
        image.within(bundle, new_name(), *without),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert result.returncode == status
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("tscwatch: ")
    assert words in last


class Container:
    """A container that runs the image's own command."""

    def __init__(self, bundle: Path) -> None:
        self.name = new_name()
        self.process = subprocess.Popen(image.within(bundle, self.name), stderr=subprocess.DEVNULL)

    def status_of(self, *command: str) -> int:
        """Run a command in the container, and return its exit status."""
        runc = ["runc", "exec", self.name, *command]
        result = subprocess.run(runc, capture_output=True, timeout=PATIENCE_S, check=False)
        return result.returncode

    @property
    def pid(self) -> int:
        state = subprocess.run(["runc", "state", self.name], capture_output=True, check=True)
        return int(json.loads(state.stdout)["pid"])


@contextmanager
def running(bundle: Path) -> Iterator[Container]:
    container = Container(bundle)
    try:
        yield container
    finally:
        container.process.terminate()
        container.process.wait(PATIENCE_S)


def image_config(bundle: Path) -> dict[str, Any]:
    """Return the image's configuration, which its manifest names."""
    layout = bundle.parent / "layout"
    blob = json.loads((layout / "index.json").read_text())["manifests"][0]
    for key in ("config", ""):
        document = json.loads((layout / "blobs" / blob["digest"].replace(":", "/")).read_text())
        blob = document.get(key)
    config: dict[str, Any] = document["config"]
    return config


def test_its_own_command_is_healthy_and_confined(bundle: Path) -> None:
    how, *check = image_config(bundle)["Healthcheck"]["Test"]
    assert how == "CMD"
    with running(bundle) as container:
        wait_for(lambda: container.status_of(*check) == 0, "the container to be healthy")
        status = Path(f"/proc/{container.pid}/status").read_text()
        assert "\nSeccomp:\t2\n" in status
        assert "\nNoNewPrivs:\t1\n" in status
        assert "\nCapBnd:\t0000000000280004\n" in status
        assert container.status_of("/usr/bin/touch", "/etc/here") != 0
        assert container.status_of("/usr/bin/test", "-r", "/sys/kernel/btf/vmlinux") == 0
        os.kill(container.pid, signal.SIGSTOP)
        assert container.status_of(*check) != 0
        os.kill(container.pid, signal.SIGCONT)


def test_it_is_small_labelled_and_without_a_compiler(bundle: Path) -> None:
    assert image.ARCHIVE.stat().st_size < 90e6
    labels = image_config(bundle)["Labels"]
    assert labels["org.opencontainers.image.title"] == "tscwatch"
    assert labels["org.opencontainers.image.version"] == __version__
    root = bundle / "rootfs"
    for pattern in ("libLLVM*", "libclang*", "libbcc*", "gcc", "cc", "linux-headers*"):
        assert list((root / "usr").rglob(pattern)) == []
    for path in ("etc/hostname", "etc/resolv.conf"):  # those of the machine that built it
        assert not (root / path).exists()
