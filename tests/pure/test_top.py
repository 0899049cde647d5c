"""The table of ``tscwatch top``, and no daemon that answers."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import category, east_asian_width

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.test_metrics import feed, skewed
from tscwatch import cli, config
from tscwatch.publish import client, top
from tscwatch.publish.state import State

SIZE = 24, 80


def rows(*changes: dict[str, Any]) -> list[top.Row]:
    """Return the skewed guest once for each set of members that are changed."""
    state = State()
    feed(state, skewed())
    (row,) = json.loads(json.dumps(state.rows()))
    return top.parse([{**row, **change} for change in changes])


def texts(guests: list[top.Row], view: top.View, size: tuple[int, int] = SIZE) -> list[str]:
    return [text.rstrip() for text, _ in top.frame(guests, view, size, "http://host")]


def shown(guests: list[top.Row], view: top.View) -> list[str]:
    return [row.vm for row, vcpu in top.entries(guests, view) if vcpu is None]


def press(view: top.View, *keys: str, count: int = 0, page: int = 20) -> top.View:
    for key in keys:
        after = top.press(view, key, page, count)
        assert after is not None
        view = after
    return view


def cells(text: str) -> int:
    """Return how many cells of a terminal a text takes."""
    return sum(
        0 if category(c) in ("Mn", "Me") else 2 if east_asian_width(c) in ("W", "F") else 1
        for c in text
    )


def mismatch(severity: str, ppm: float | None = None, apart: float | None = None) -> dict[str, Any]:
    kind = "vcpu_skew" if apart is None else "desync"
    sizes = {"ppm": ppm, "apart_seconds": apart}
    return {"kind": kind, "severity": severity, "phase": "hotplug", **sizes}


AT_RISK = {"vm": "b-at-risk", "mismatches": [], "hotplug_risk": True}
FLEET: list[dict[str, Any]] = [
    {"vm": "a-healthy", "mismatches": [], "hotplug_risk": False, "owner": None},
    {
        "vm": "b-at-risk",
        "mismatches": [],
        "hotplug_risk": True,
        "owner": {"namespace": "zoo", "name": "b"},
    },
    {"vm": "c-far", "mismatches": [mismatch("critical", 5.0, 9.0)], "owner": {"name": "c"}},
    {"vm": "d-near", "mismatches": [mismatch("critical", 7.0, 1.5), mismatch("info", 8.0)]},
    {"vm": "e-warned", "mismatches": [mismatch("warning", 60.0)], "owner": {"name": "e"}},
    {"vm": "f-informed", "mismatches": [mismatch("info", 1.0)], "owner": {"name": "f"}},
]


def test_a_skewed_guest_line_by_line() -> None:
    assert list(top.table(rows({}))) == [
        "vm                    vcpu  requested   reported  effective  last call            "
        "owner                    severity state",
        "guest-100                0    2600000    2600000    2600000  boot/post_init       "
        "shop/db                  critical vcpu_skew 100.0 ppm since hotplug, "
        "KVM: 1 synchronised",
        "                         1    2600260    2600260    2600260  hotplug/post_init",
    ]


def test_a_guest_without_a_known_vcpu_has_a_line() -> None:
    *_, line = top.table(rows({"vm": "critical-one", "vcpus": {}}))
    assert line.split()[:8] == ["critical-one", *"-----", "shop/db", "critical"]


def test_the_last_line_lists_the_keys_in_the_narrowest_terminal() -> None:
    last = texts(rows({}), top.View())[-1]
    for key in ("q quit", "/ filter", "v vCPUs", "PgUp/Dn", *(f" {key} " for key in top.ORDERS)):
        assert key in last
    assert "~" not in last


def test_a_screen_line_by_line() -> None:
    lines = texts(rows({}, FLEET[0]), top.View(vcpus=True), (8, 80))
    assert lines == [
        "2 guests (1-4) by severity: 1 critical, 1 ok  http://host",
        "vm                 severity mismatches                          owner",
        "     vcpu  requested   reported  effective  last call",
        "guest-100          critical vcpu_skew 100.0 ppm since hotplug,~ shop/db",
        "        0    2600000    2600000    2600000  boot/post_init",
        "        1    2600260    2600260    2600260  hotplug/post_init",
        "a-healthy          ok       KVM: 1 synchronised",
        "q quit  / filter  v vCPUs  PgUp/Dn  sort s severity a apart p ppm n name o owner",
    ]


def test_the_worst_mismatch_is_named_first() -> None:
    both = [mismatch("critical", 7.0), mismatch("info", 8.0), mismatch("critical", 7.0, 1.5)]
    (row,) = rows({"mismatches": both, "synchronised": None})
    named = "desync 1.5 s since hotplug, vcpu_skew 7.0 ppm since hotplug, vcpu_skew 8.0 ppm"
    assert row.states == f"{named} since hotplug"


def test_a_guest_at_risk_and_one_without_sizes() -> None:
    healthy, at_risk, unknown = rows(
        {**FLEET[0], "synchronised": 2},
        {**AT_RISK, "synchronised": None},
        {"mismatches": [{**mismatch("info"), "phase": "unknown"}], "hotplug_risk": True},
    )
    assert healthy == (*("a-healthy", "", "ok", "", 0, 0), healthy.vcpus)
    assert (at_risk.level, at_risk.states) == ("risk", "hotplug risk")
    assert (unknown.level, unknown.apart_seconds, unknown.ppm) == ("risk", 0, 0)
    assert unknown.states == "vcpu_skew, hotplug risk, KVM: 1 synchronised"
    owner = {"namespace": "a", "project": "b", "vmid": "c", "name": "d", "platform": "e"}
    assert rows({"owner": owner})[0].owner == "a/b/c/d"


@pytest.mark.parametrize(
    ("key", "order"),
    [("s", "cdebfa"), ("a", "cdebfa"), ("p", "edcfba"), ("n", "abcdef"), ("o", "cefdba")],
)
def test_the_keys_that_sort(key: str, order: str) -> None:
    names = shown(rows(*FLEET), press(top.View(), key))
    assert "".join(name[0] for name in names) == order


def test_a_filter_is_typed() -> None:
    view = press(top.View(first=3), "/", *"CRITICALq", "backspace")
    assert (view.typing, view.first) == (True, 0)
    assert texts(rows(*FLEET), view)[-1] == "filter: CRITICAL_"
    view = press(view, "enter")
    assert shown(rows(*FLEET), view) == ["c-far", "d-near"]
    assert texts(rows(*FLEET), view)[0].startswith("2 of 6 guests by severity: 2 critical, ")
    assert shown(rows(*FLEET), press(top.View(), "/", *"zoo/b")) == ["b-at-risk"]
    assert shown(rows(*FLEET), press(view, "escape")) == shown(rows(*FLEET), top.View())
    assert shown(rows(*FLEET), press(view, "/", *"desync", "enter")) == ["c-far", "d-near"]
    assert "no guest matches" in texts(rows(*FLEET), press(view, "/", "~"))
    assert "no guest" in texts([], top.View())
    assert press(view, "/", *"x" * 99).pattern == "x" * 64
    assert press(view, "/", "x", "down", "\x00", "") == press(view, "/", "x")
    assert press(view, "/", "x", "escape") == top.View()


def test_the_vcpus_are_shown_and_hidden() -> None:
    view = press(top.View(first=9), "v")
    assert view == top.View(vcpus=True)
    assert len(top.entries(rows(*FLEET), view)) == 3 * len(FLEET)
    assert press(view._replace(first=9), "v") == top.View()
    assert press(top.View(first=9), "p") == top.View(order="p")


def test_scrolling_stays_within_the_entries() -> None:
    steps = partial(press, page=20, count=50)
    assert steps(top.View(), "up", "home", "previous").first == 0
    assert steps(top.View(), "next", "down").first == 21
    assert steps(top.View(), " ", "next", "next", "down").first == 30
    assert steps(top.View(), "end", "up").first == 29
    assert press(top.View(first=30), "up", page=20, count=25).first == 4  # guests have ended
    assert steps(top.View(first=30), "previous", "up").first == 9
    assert steps(top.View(first=9), "home").first == 0
    assert steps(top.View(first=9), "x").first == 9
    assert press(top.View(), "down", "end", page=20, count=20).first == 0
    assert top.press(top.View(), "q", 20, 50) is None


def test_the_title_has_which_entries_are_shown() -> None:
    guests = rows(*({"vm": f"{number:02}"} for number in range(9)))
    titles = [texts(guests, top.View(first=first), (8, 80))[0] for first in (0, 2, 9)]
    assert [title.partition(" by")[0] for title in titles] == [
        "9 guests (1-5)",
        "9 guests (3-7)",
        "9 guests (5-9)",
    ]
    assert texts(guests, top.View(first=9), (8, 80))[2].startswith("04 ")
    assert texts(guests, top.View(), (12, 80))[0].startswith("9 guests by severity: 9 critical ")


@pytest.mark.parametrize("width", [80, 84, 120])
def test_wider_columns_show_more(width: int) -> None:
    """Half of what is added shows more of the mismatches, and a quarter each more of the names."""
    more = width - 80
    guest = rows(
        {"vm": "v" * 99, "owner": {"name": "o" * 99}, "mismatches": [mismatch("info")] * 9}
    )
    line = texts(guest, top.View(), (24, width))[2]
    vm, level, *_ = line.split()
    assert (vm, level) == ("v" * (17 + more // 4) + "~", "info")
    assert line.endswith(" " + "o" * (15 + more // 4) + "~")
    assert line.index("~ o") == 18 + more // 4 + 10 + 35 + more // 2 - 1
    assert press(top.View(), "", "x", "\x00") == top.View()


@given(st.text(max_size=60), st.integers(0, 120), st.integers(1, 30), st.booleans())
def test_no_name_steers_the_terminal_or_is_wrapped(
    name: str, width: int, height: int, vcpus: bool
) -> None:
    guests = rows({"vm": name, "owner": {"name": name}}, FLEET[0])
    view = top.View(pattern=name[:5], vcpus=vcpus, typing=True)
    for line in (*texts(guests, view, (height, width)), *top.table(guests)):
        assert line.isprintable()
    lines = [text for text, _ in top.frame(guests, view, (height, width), "http://host")]
    assert [cells(line) for line in lines] == [width] * height


def test_wide_and_combining_characters_are_measured() -> None:
    assert top.fit("\u6f22\u5b57", 3) == "\u6f22~"
    assert top.fit("\u6f22\u5b57", 5) == "\u6f22\u5b57 "
    assert top.fit("\u6f22\u5b57", 2) == "~ "
    assert top.fit("e\u0301a", 3) == "e\u0301a "
    assert top.fit("\u0301", 0) == ""
    assert top.fit("a\u20dd\uff21", 4) == "a\u20dd\uff21 "
    assert [top.fit(text, 1) for text in ("", "a", "ab", "\u6f22")] == [" ", "a", "~", "~"]


def test_in_a_terminal_of_one_column_each_line_is_marked_as_cut() -> None:
    view = top.View(pattern="guest", vcpus=True, typing=True)
    assert texts(rows({}), view, (6, 1)) == ["~", "~", "~", "~", "~", "~"]
    assert texts(rows({}), view, (1, 1)) == ["~"]


def test_a_page_is_what_is_left_of_the_screen_but_never_empty() -> None:
    sizes = [top.page_size(top.View(vcpus=vcpus), 24) for vcpus in (False, True)]
    assert sizes == [21, 20]
    assert top.page_size(top.View(), 1) == 1


def test_why_the_rows_are_old_is_shown_instead_of_the_title() -> None:
    (first, style), *_ = top.frame(rows({}), top.View(), SIZE, "http://host", "no answer " * 20)
    assert (style, len(first), first[-1]) == ("error", 80, "~")


@pytest.mark.parametrize(
    "answer", [{}, {"a": 1}, [1], [{}], [[]], None, 7, [{"vm": 7, "mismatches": 7}]]
)
def test_an_answer_that_is_not_a_tscwatchs(answer: Any) -> None:
    if not answer and answer is not None:
        assert top.parse(answer) == []
        return
    with pytest.raises(ValueError, match="not the guests"):
        top.parse(answer)


@pytest.mark.parametrize("member", ["vm", "owner", "vcpus", "mismatches", "hotplug_risk"])
@pytest.mark.parametrize("value", [7, "x", [7], {"a": [7]}, [{"severity": "x"}]])
def test_an_answer_with_one_wrong_member(member: str, value: Any) -> None:
    with suppress(ValueError):  # no other exception
        rows({member: value})


def test_no_daemon_answers(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    assert cli.main(["top", "--url", "http://127.0.0.1:9"]) == 12
    assert "tscwatch run" in caplog.text
    (tmp_path / "vms").write_text("not JSON")
    assert cli.main(["top", "--url", tmp_path.as_uri()]) == 12
    (tmp_path / "vms").write_text("[7]")
    assert cli.main(["top", "--url", tmp_path.as_uri()]) == 12
    assert "not the guests of a tscwatch" in caplog.text


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        ("{}", "http://127.0.0.1:9978"),
        ("{address: '192.0.2.7', port: 9}", "http://192.0.2.7:9"),
        ("{address: '0.0.0.0'}", "http://127.0.0.1:9978"),
        ("{address: '::'}", "http://[::1]:9978"),
    ],
)
def test_the_configuration_has_the_address(tmp_path: Path, listen: str, url: str) -> None:
    file = tmp_path / "tscwatch.yaml"
    file.write_text(f"listen: {listen}\n")
    assert client.from_config(config.load(file)).url == url


def test_a_port_that_the_kernel_chose(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tscwatch.yaml"
    file.write_text("listen: {port: 0}\n")
    assert cli.main(["top", "--config", str(file)]) == 2
    assert "with --url" in caplog.text


def test_a_certificate_that_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tscwatch.yaml"
    file.write_text(f"listen: {{web_config: {tmp_path}/web.yml}}\n")
    (tmp_path / "web.yml").write_text("tls_server_config: {cert_file: cert.pem, key_file: key}\n")
    assert cli.main(["top", "--config", str(file)]) == 2
    (tmp_path / "cert.pem").write_text("no PEM")
    assert cli.main(["top", "--config", str(file)]) == 2
    assert caplog.text.count("cert.pem: the daemon's certificate cannot be used") == 2
