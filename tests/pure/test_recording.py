"""Recordings: what was written can be read, and errors name the line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.histories import HOST_KHZ, History, histories
from tscwatch import recording
from tscwatch.errors import RecordingError
from tscwatch.model import Event, Guest, Host, Line, Owner

HEADER = '{"format":"tscwatch-recording","version":3}\n'
HEADER_1, HEADER_2 = HEADER.replace("3", "1"), HEADER.replace("3", "2")


def read_all(path: Path) -> list[Event | Host]:
    return list(recording.read(path))


@given(histories())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, history: History) -> None:
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    written: list[Event | Host] = [
        Host(HOST_KHZ, True, 123, "tsc"),
        *history.events,
        Event(9, "tsc_lines", "kvm:0", 1, 0, "", lines=(Line(0, -9), Line(1, 7, 0.5)), host_tsc=8),
        Host(),
    ]
    writer = recording.Writer(path)
    for event in written:
        writer.write(event)
    writer.close()
    assert read_all(path) == written


def test_the_types_come_from_the_annotations() -> None:
    assert set(recording._EVENT_FIELDS) | {"guest", "lines"} == set(Event._fields)
    assert set(recording._GUEST_FIELDS) | {"owner"} == set(Guest._fields)
    assert set(recording._HOST_FIELDS) == set(Host._fields)
    assert recording._EVENT_FIELDS["khz"].type is int
    assert recording._EVENT_FIELDS["after"].choices == ("create", "cpuid", "sregs", "regs")


def test_an_owner_is_not_recorded(tmp_path: Path) -> None:
    path = tmp_path / "owned.jsonl"
    guest = Guest(7, "qemu", "instance-1")
    owned = guest._replace(owner=Owner("openstack", name="db", project="shop"))
    writer = recording.Writer(path)
    writer.write(Event(1, "vm_create", "kvm:1", 7, 7, "", guest=owned))
    writer.close()
    assert read_all(path) == [Event(1, "vm_create", "kvm:1", 7, 7, "", guest=guest)]
    assert "shop" not in path.read_text()


def test_the_ratio_of_version_2_is_dropped(tmp_path: Path) -> None:
    """It was read later than the SET that it was stored with."""
    path = tmp_path / "2.jsonl"
    path.write_text(HEADER_2 + '{"op":"set","khz":7,"scale":0.5}\n')
    assert read_all(path) == [Event(0, "set", "", 0, 0, "", khz=7)]


LINE = '{"op":"tsc_lines","lines":[{"vcpu":0,"offset":0,"ratio":RATIO}]}\n'


@pytest.mark.parametrize("lines", ["7", "[7]", '[{"vcpu":0}]', '[{"vcpu":0,"offset":"x"}]'])
def test_lines_that_are_none(tmp_path: Path, lines: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{HEADER}{{"op":"tsc_lines","lines":{lines}}}\n')
    with pytest.raises(RecordingError, match=":2"):
        read_all(path)


def test_version_1_is_read(tmp_path: Path) -> None:
    """Its ``arg`` and ``result`` meant something else for each operation."""
    path = tmp_path / "1.jsonl"
    lines = (
        '"op":"set","arg":7',
        '"op":"set","arg":7,"result":-22',
        '"op":"get","arg":9,"result":7',
        '"op":"get","result":-5',
        '"op":"get","scale":0.5',
        '"op":"vcpu_found","result":7',
        '"op":"vcpu_found"',
        '"op":"lost","arg":3',
        '"op":"tsc_tracked","arg":1,"result":2',
        '"op":"vcpu_create","vcpu":0',
    )
    path.write_text(HEADER_1 + "".join(f"{{{line}}}\n" for line in lines))
    empty = Event(0, "lost", "", 0, 0, "")
    assert read_all(path) == [
        empty._replace(op="set", khz=7),
        empty._replace(op="set", khz=7, status=-22),
        empty._replace(op="get", khz=7),
        empty._replace(op="get", status=-5),
        empty._replace(op="get", khz=0),
        empty._replace(op="vcpu_found", khz=7),
        empty._replace(op="vcpu_found"),
        Event.lost(0, 3),
        empty._replace(op="tsc_tracked", matched_vcpus=1, online_vcpus=2),
        empty._replace(op="vcpu_create", vcpu=0),
    ]


@pytest.mark.parametrize("khz", [(1 << 64) - 1, 1 - (1 << 64), 1, 0])
def test_numbers_of_64_bits_are_read(tmp_path: Path, khz: int) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f'{HEADER}{{"op":"get","khz":{khz}}}\n{{"host":{{"tsc_khz":1}}}}\n')
    assert read_all(path) == [Event(0, "get", "", 0, 0, "", khz=khz), Host(1)]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", 1, "not a recording"),
        ("hello\n", 1, "not JSON"),
        ("{}\n", 1, "not a recording"),
        ("[]\n", 1, "not a JSON object"),
        ('{"format":"tscwatch-recording","version":9}\n', 1, "version 9"),
        ('{"format":"tscwatch-recording","version":9}\n', 1, "reads versions 1 and 2 and 3"),
        ('{"format":"tscwatch-recording"}\n', 1, "version None"),
        (HEADER + '{"op":"get"', 2, "cut off"),
        (HEADER + '{"op":"fly"}\n', 2, "unknown op"),
        (HEADER + '{"op":"get"}\n{"op":"get","pid":"x"}\n', 3, "pid is not of type int"),
        (HEADER + '{"op":"get","pid":true}\n', 2, "pid is not of type int"),
        (HEADER + '{"op":"get","colour":1}\n', 2, "colour"),
        (HEADER + '{"op":"get","arg":1}\n', 2, "arg"),
        (HEADER + '{"op":"get","scale":0.5}\n', 2, "scale"),
        (HEADER_2 + '{"op":"get","arg":1}\n', 2, "arg"),
        (HEADER + '{"op":"get","after":"lunch"}\n', 2, "unknown after"),
        (HEADER + '{"op":"get","guest":[]}\n', 2, "guest"),
        (HEADER + '{"op":"get","guest":{"pid":[]}}\n', 2, "pid"),
        (HEADER + '{"host":{"scaling":1}}\n', 2, "scaling"),
        (HEADER + '{"host":7}\n', 2, "host is not a JSON object"),
        (HEADER + '{"host":{"tsc_khz":0}}\n', 2, "rate is not positive"),
        (HEADER + '{"host":{"tsc_khz":-1}}\n', 2, "rate is not positive"),
        (HEADER + f'{{"op":"get","khz":{1 << 64}}}\n', 2, "khz is out of range"),
        (HEADER + f'{{"op":"get","khz":{-1 << 64}}}\n', 2, "khz is out of range"),
        (HEADER + LINE.replace("RATIO", "0.0"), 2, "rate is not positive"),
        (HEADER + LINE.replace("RATIO", "-1.0"), 2, "rate is not positive"),
        (HEADER + LINE.replace("RATIO", "NaN"), 2, "ratio is out of range"),
        (HEADER + LINE.replace("RATIO", "1e999"), 2, "ratio is out of range"),
        (HEADER + '{"op":"get","khz":1' + "0" * 400 + "}\n", 2, "khz is out of range"),
        (HEADER + "[" * 5000 + "\n", 2, "not JSON"),
    ],
)
def test_a_foreign_or_truncated_file_is_refused_by_line(
    tmp_path: Path, text: str, line: int, reason: str
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(RecordingError) as caught:
        read_all(path)
    assert f"r.jsonl:{line}: " in str(caught.value)
    assert reason in str(caught.value)


@given(st.binary(max_size=300))
def test_no_bytes_break_it(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(HEADER.encode() + data)
    try:
        read_all(path)
    except RecordingError as error:
        assert str(path) in str(error)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="cannot be written"):
        recording.Writer(tmp_path / "no" / "where")


def test_a_full_disk_is_reported() -> None:
    with pytest.raises(RecordingError, match="free space"):
        recording.Writer(Path("/dev/full"))
