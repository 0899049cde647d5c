"""The kvm module is loaded after the daemon has started, unloaded, and loaded again."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.guests import Guest, wait_for
from tests.support.observer import Observer
from tests.support.scenarios import boot

SCALING = "host_tsc_scaling_supported"
"""The alert TscwatchBlind takes it as the sign that the host can use KVM."""


def _modprobe(*arguments: str) -> None:
    subprocess.run(["modprobe", *arguments], check=True)


@pytest.mark.parametrize("source", ["bcc", "ftrace"])
def test_follows_the_kvm_module(source: str, tmp_path: Path) -> None:
    _modprobe("-r", "kvm-amd")
    assert not Path("/sys/module/kvm").exists()
    with Observer(tmp_path, "--json", "--source", source) as observer:
        assert 'tscwatch_probe_attached{probe="kvm_arch_vcpu_ioctl"} 0.0' in observer.metrics()
        assert not observer.series(SCALING)
        for name in ("first-load", "second-load"):
            _modprobe("kvm-amd")
            wait_for(lambda: 'probe="kvm_arch_vcpu_ioctl"} 1.0' in observer.metrics(), "the probes")
            with Guest(tmp_path, name):
                pass
            observer.wait_for_calls(name, len(boot(2)))
            assert observer.places(name) == boot(2)
            wait_for(lambda: bool(observer.series(SCALING)), "the host's facts")
            _modprobe("-r", "kvm-amd")
            wait_for(lambda: 'probe="kvm_arch_vcpu_ioctl"} 0.0' in observer.metrics(), "the unload")
            wait_for(lambda: not observer.series(SCALING), "the host's facts to follow")
        assert observer.losses() == []  # nobody else has disabled anything
        assert observer.stop() == 0
    _modprobe("kvm-amd")


def test_what_bpf_lacks_shows_before_the_module_is_loaded(tmp_path: Path) -> None:
    """Then ftrace is chosen; at the load it would be too late."""
    (tmp_path / "bcc.py").write_text("raise ImportError('no bcc')\n")
    cache = "/var/cache/tscwatch"
    script = f'mkdir -p {cache} && mount -t tmpfs none {cache} && PYTHONPATH={tmp_path} exec "$@"'
    _modprobe("-r", "kvm-amd")
    try:
        within = ("unshare", "--mount", "sh", "-c", script, "sh")
        with Observer(tmp_path, "--json", within=within) as observer:
            assert 'source="ftrace"' in observer.metrics()
            _modprobe("kvm-amd")
            wait_for(observer.is_ready, "the probes")
            with Guest(tmp_path, "seen"):
                observer.wait_for_calls("seen", len(boot(2)))
                assert observer.places("seen") == boot(2)
    finally:
        _modprobe("kvm-amd")
