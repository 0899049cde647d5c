"""``tscwatch run`` and ``tscwatch record``, with the events that a test provides."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Callable, Union

import pytest

from tests.pure.test_metrics import EXACT, skewed
from tscwatch import cli, daemon, recording
from tscwatch.clock import now_ns
from tscwatch.daemon import SignalFlags, signal_flags
from tscwatch.model import Event, Health, Host, SourceInfo
from tscwatch.publish import web

HISTORY = skewed().events
Script = Callable[[SignalFlags], Iterable[list[Event]]]


class Stream:
    """Stands for an event stream: a script yields the batches, until it ends.

    Between two of them, the script sees what the daemon has done with the first.
    """

    info = SourceInfo("bcc", "kprobe", "kvm_vcpu_ioctl")

    def __init__(self, script: Script) -> None:
        self.script = script
        self.source = self
        self.probes = {"kvm_vcpu_ioctl": True}
        self.done: list[str] = []

    def health(self) -> Health:
        return Health(self.probes, sent=3, received=2)

    def drop_capabilities(self) -> None:
        self.done.append("drop capabilities")

    def existing(self) -> Iterator[Union[Event, Host]]:
        self.done.append("existing")
        yield EXACT
        yield from HISTORY[:-2]

    def follow(self, flags: SignalFlags) -> Iterator[Iterator[Event]]:
        for batch in self.script(flags):
            yield iter(batch)

    def close(self) -> None:
        self.done.append("close")


@pytest.fixture
def start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[..., int]:
    """Return a function that runs a command line with a stream, and returns its exit status.

    Each look at the clock is a second later than the one before.
    """
    seconds = count()
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(daemon, "now_ns", lambda: next(seconds) * 10**9)
    monkeypatch.setattr(daemon, "drop_capabilities_except", lambda _kept: None)
    Path("tscwatch.yaml").write_text("listen: {port: 0}\n")

    def start(stream: Stream, *arguments: str) -> int:
        def opened(name: str) -> Stream:
            stream.done.append(f"open {name}")
            return stream

        monkeypatch.setattr(daemon, "EventStream", opened)
        return cli.main([*arguments, "--config", "tscwatch.yaml"])

    return start


def get(port: int, path: str) -> tuple[int, str]:
    """Return the HTTP status and the text of a path."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as client:
        client.request("GET", path)
        response = client.getresponse()
        return response.status, response.read().decode()


def port_of(caplog: pytest.LogCaptureFixture) -> int:
    """Return the port of the running daemon, as it has logged it."""
    (port,) = re.findall(r"metrics: http://127\.0\.0\.1:(\d+)/metrics\n", caplog.text)
    return int(port)


def test_a_life_of_the_daemon(
    start: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("notify")
        systemd.settimeout(60)
        receive = partial(systemd.recv, 999)

        def script(flags: SignalFlags) -> Iterator[list[Event]]:
            metrics = partial(get, port_of(caplog), "/metrics")
            assert receive() == b"READY=1\nSTATUS=watching 1 VMs, 0 mismatches"
            assert 'tscwatch_probe_attached{probe="kvm_vcpu_ioctl"} 1.0' in metrics()[1]
            assert 'stage="capture"} 2.0' in metrics()[1]
            assert "MISMATCH" not in capfd.readouterr().out
            yield HISTORY[-2:]
            assert receive() == b"WATCHDOG=1\nSTATUS=watching 1 VMs, 1 mismatches"
            assert "MISMATCH raised: vcpu_skew" in capfd.readouterr().out
            assert "process_resident_memory_bytes" in metrics()[1]
            text = Path("tscwatch.prom").read_text()
            assert 'tscwatch_mismatch_active{kind="vcpu_skew"' in text
            assert "\nprocess_" not in text  # node_exporter has its own
            monkeypatch.setattr(daemon, "now_ns", lambda: 10**12)
            yield []
            assert receive().startswith(b"WATCHDOG=1")
            yield []  # within the same second
            os.kill(os.getpid(), signal.SIGTERM)
            assert flags.stop

        stream = Stream(script)
        assert start(stream, "run", "--textfile", "tscwatch.prom") == 0
        assert receive() == b"STOPPING=1"
    assert stream.done == ["open auto", "drop capabilities", "existing", "close"]


def test_calls_that_are_still_folded_are_logged_at_the_end(
    start: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    polled = HISTORY[-2]._replace(op="get", tid=9, after=None, status=-5)

    def script(_flags: SignalFlags) -> Iterator[list[Event]]:
        yield [polled] * 9
        assert "the last of" not in capfd.readouterr().out

    assert start(Stream(script), "run") == 0
    assert capfd.readouterr().out.endswith("EIO  (the last of 6)\n")


def test_calls_that_were_folded_are_logged_after_ten_seconds(
    start: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    polled = HISTORY[-2]._replace(op="get", tid=9, after=None, status=-5)

    def script(_flags: SignalFlags) -> Iterator[list[Event]]:
        yield [polled] * 9
        for _ in range(20):
            yield []
        assert "(the last of 6)" in capfd.readouterr().out

    assert start(Stream(script), "run") == 0


@pytest.mark.parametrize(
    ("settings", "options", "source", "is_json"),
    [
        ("", (), "auto", False),
        ("source: ftrace\nlog_format: json\n", (), "ftrace", True),
        ("source: ftrace\n", ("--source", "bcc", "--json"), "bcc", True),
    ],
)
def test_an_option_overrides_the_configuration(
    start: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
    settings: str,
    options: tuple[str, ...],
    source: str,
    is_json: bool,
) -> None:
    Path("tscwatch.yaml").write_text(f"listen: {{port: 0}}\n{settings}")
    stream = Stream(lambda _flags: [])
    assert start(stream, "run", *options) == 0
    assert stream.done[0] == f"open {source}"
    lines = capfd.readouterr().out.splitlines()
    assert [line.startswith("{") for line in lines] == [is_json] * len(lines)
    assert lines


def test_a_reload(
    start: Callable[..., int],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def reload(settings: str) -> None:
        Path("tscwatch.yaml").write_text(settings)
        os.kill(os.getpid(), signal.SIGHUP)

    ratio = 'tscwatch_mismatch_active{kind="vcpu_skew"'
    vcpus = "tscwatch_vcpu_tsc_reported_hertz{"
    good = "listen: {port: 0}\nmetrics: {per_vcpu: none}\n"

    def script(flags: SignalFlags) -> Iterator[list[Event]]:
        metrics = partial(get, port_of(caplog), "/metrics")
        yield HISTORY[-2:]
        assert ratio in metrics()[1]
        assert vcpus in metrics()[1]
        reload(f"{good}tolerance_ppm: {{vcpu_skew: 200}}\nlog_format: json\n")
        capfd.readouterr()
        yield []
        assert ratio not in metrics()[1]
        assert vcpus not in metrics()[1]
        assert json.loads(capfd.readouterr().out)["state"] == "cleared"
        assert "the configuration was reloaded" in caplog.text
        assert not flags.reload
        reload("tolerance_ppm: {vcpu_skew: lots}\n")
        yield []
        assert "tscwatch.yaml:1: tolerance_ppm.vcpu_skew" in caplog.text
        assert "the previous configuration stays in force" in caplog.text
        assert "tscwatch_config_last_reload_successful 0.0" in metrics()[1]
        assert ratio not in metrics()[1]
        assert "take effect at the next start" not in caplog.text
        listen = "listen: {port: 0}", "listen: {port: 1}", "listen: {port: 1, web_config: w.yml}"
        for setting in (*listen, "listen: {port: 1, web_config: w.yml, address: '::1'}"):
            caplog.clear()
            reload(f"source: bcc\n{setting}\n")
            yield []
            assert "source and listen take effect at the next start" in caplog.text
            assert "the configuration was reloaded" in caplog.text

    assert start(Stream(script), "run") == 0


def test_the_daemon_is_ready_while_its_loop_runs_and_all_probes_are_attached(
    start: Callable[..., int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [now_ns()]
    monkeypatch.setattr(web, "now_ns", lambda: now[0])

    def script(_flags: SignalFlags) -> Iterator[list[Event]]:
        port = port_of(caplog)
        assert get(port, "/readyz")[0] == 200
        for attached in (False, True):
            now[0] += 60 * 10**9
            assert get(port, "/healthz")[0] == 503
            stream.probes["kvm_arch_init_vm"] = attached
            yield []
            assert get(port, "/healthz")[0] == 200
            assert get(port, "/readyz")[0] == (200 if attached else 503)

    stream = Stream(script)
    assert start(stream, "run") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("may_reload", [True, False])
def test_what_a_signal_requests(number: signal.Signals, may_reload: bool) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    reloads = may_reload and number == signal.SIGHUP
    with signal_flags(may_reload) as flags:
        assert flags == SignalFlags(stop=False, reload=False)
        os.kill(os.getpid(), number)
        assert flags == SignalFlags(stop=not reloads, reload=reloads)
    after = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert after == before


def test_a_recording_has_what_existed_and_what_happened(
    start: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    def recorded() -> list[Union[Event, Host]]:
        events = recording.read(Path("run.jsonl"))
        return [e._replace(guest=HISTORY[0].guest) if isinstance(e, Event) else e for e in events]

    def script(flags: SignalFlags) -> Iterator[list[Event]]:
        assert recorded() == [EXACT, *HISTORY[:-2]]
        yield HISTORY[-2:]
        os.kill(os.getpid(), signal.SIGHUP)
        assert flags.stop

    stream = Stream(script)
    Path("tscwatch.yaml").write_text("source: bcc\n")
    assert start(stream, "record", "-o", "run.jsonl") == 0
    assert recorded() == [EXACT, *HISTORY]
    assert stream.done == ["open bcc", "drop capabilities", "existing", "close"]
    assert start(stream, "record", "-o", "run.jsonl", "--source", "ftrace") == 0
    assert "open ftrace" in stream.done
