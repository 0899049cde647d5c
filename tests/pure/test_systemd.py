"""The bytes that systemd and journald receive; the live tier sends them to the real ones."""

from __future__ import annotations

import os
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.pure.test_format import first_call
from tscwatch.model import Contradiction, Mismatch, Owner, Risk
from tscwatch.publish import systemd
from tscwatch.publish.format import LogItem, LogLine, as_text
from tscwatch.publish.publisher import choose_log, no_log

CALL = first_call()
MISMATCH = Mismatch(
    *(1, "raised", "vcpu_skew", "db", CALL.guest, (2, 3), None, "warning", "hotplug", "off")
)


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an own directory: the name of a socket must be short."""
    monkeypatch.chdir(tmp_path)


@contextmanager
def receiver(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as received:
        received.bind(address)
        received.settimeout(60)
        yield received


@pytest.mark.parametrize("address", ["notify", f"@tscwatch-{os.getpid()}"])
def test_what_systemd_is_notified_of(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with receiver(address.replace("@", "\0")) as received:
        systemd.notify_ready("watching 1 VMs")
        assert received.recv(999) == b"READY=1\nSTATUS=watching 1 VMs"
        systemd.notify_alive("watching 2 VMs")
        assert received.recv(999) == b"WATCHDOG=1\nSTATUS=watching 2 VMs"
        before = time.monotonic_ns() // 1000
        systemd.notify_reloading()
        after = time.monotonic_ns() // 1000
        reloading = re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=(\d+)", received.recv(999))
        assert reloading
        assert before <= int(reloading[1]) <= after
        systemd.notify_stopping()
        assert received.recv(999) == b"STOPPING=1"


def test_a_systemd_that_does_not_listen_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.notify_ready("")
    assert caplog.text == ""
    monkeypatch.setenv("NOTIFY_SOCKET", "nowhere")
    systemd.notify_ready("")
    assert "nowhere: systemd cannot be notified (No such file" in caplog.text


def entry(line: LogLine) -> dict[str, str]:
    """Return the fields of a line's journal entry, as journald decodes its native protocol."""
    with receiver("journal") as received:
        systemd.send_to_journal(line, Path("journal"))
        data = received.recv(9999)
    Path("journal").unlink()
    fields = {}
    while data:
        name, _, rest = data.partition(b"\n")
        (length,) = struct.unpack("<Q", rest[:8])
        fields[name.decode()] = rest[8 : 8 + length].decode()
        assert rest[8 + length : 9 + length] == b"\n"
        data = rest[9 + length :]
    return fields


def test_the_fields_of_a_journal_entry() -> None:
    owner = Owner("openstack", name="db\nPRIORITY=0", project="shop")
    line = LogLine(MISMATCH._replace(guest=CALL.guest._replace(owner=owner)), times=3)
    fields = entry(line)
    assert fields["MESSAGE"] == as_text(line)
    assert (fields["PRIORITY"], fields["SYSLOG_IDENTIFIER"]) == ("4", "tscwatch")
    shown = {name[9:]: value for name, value in fields.items() if name.startswith("TSCWATCH_")}
    assert len(shown) == len(fields) - 3
    assert shown["TYPE"] == "mismatch"
    assert shown["VCPUS"] == "2,3"
    assert shown["TIMES"] == "3"
    assert (shown["OWNER_NAME"], shown["OWNER_PROJECT"]) == ("db\nPRIORITY=0", "shop")
    assert not {"PPM", "OWNER"} & set(shown)
    assert entry(LogLine(CALL))["TSCWATCH_EVIDENCE"] == "after:create,machine:incomplete"


@pytest.mark.parametrize(
    ("item", "priority"),
    [
        (CALL, "6"),
        (MISMATCH._replace(severity="critical"), "3"),
        (MISMATCH, "4"),
        (MISMATCH._replace(severity="info"), "6"),
        (MISMATCH._replace(severity="critical", state="cleared"), "5"),
        (Risk(1, "db", CALL.guest, True, "off"), "5"),
        (Contradiction(1, "db", CALL.guest, "phase", "two sides"), "4"),
    ],
)
def test_the_priority_of_a_journal_entry(item: LogItem, priority: str) -> None:
    assert entry(LogLine(item))["PRIORITY"] == priority


def test_without_journald_there_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    systemd.send_to_journal(LogLine(MISMATCH), Path("nowhere"))
    assert capsys.readouterr().out == f"{as_text(LogLine(MISMATCH))}\n"


def test_the_log_is_text_or_json_or_in_the_journal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = LogLine(CALL)
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    choose_log(as_json=False)(line)
    choose_log(as_json=True)(line)
    no_log(line)
    text, json, *more = capfd.readouterr().out.splitlines()
    assert text == as_text(line)
    assert json.startswith('{"type":"call",')
    assert more == []
    stream = os.fstat(sys.stdout.fileno())
    monkeypatch.setenv("JOURNAL_STREAM", f"{stream.st_dev}:{stream.st_ino}")
    assert choose_log(as_json=False) is systemd.send_to_journal
    assert choose_log(as_json=True) is not systemd.send_to_journal
    monkeypatch.setenv("JOURNAL_STREAM", f"{stream.st_dev}:{stream.st_ino + 1}")
    assert choose_log(as_json=False) is not systemd.send_to_journal
