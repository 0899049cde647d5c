"""``tscwatch top`` in a real terminal (tmux), and the daemon that it finds and logs in to."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.live.test_web_config import WEB, certificate
from tests.pure.test_metrics import feed, skewed
from tests.support import browser, pictures, tiny_vmm
from tests.support.histories import History
from tests.support.observer import Observer, run
from tests.support.prometheus import DEPLOY, free_port
from tests.support.terminal import Terminal, served
from tscwatch.model import Guest, Owner
from tscwatch.publish.state import State

HOSTILE = "\x1b[2J\x1b]0;owned\x07\u202e\r\n" * 9
SKEWED = [f"web-{number:03}" for number in range(0, 200, 20) if number != 40]


@contextmanager
def many_guests(count: int) -> Iterator[str]:
    """Serve guests of whom every twentieth is skewed, and one is hostile; yield the address."""
    state = State()
    for number in range(count):
        history = skewed()
        if number % 20:
            history = History("", 0)
            history.emit("vm_create")
            history.new_vcpu(0, "boot")
            history.write_all("boot")
        name = HOSTILE if number == 40 else f"web-{number:03}"
        owner = Owner("openstack", name=name, project=f"project-{number % 7}")
        guest = Guest(1000 + number, "qemu", name, max_vcpus=4, owner=owner)
        history.events = [
            event._replace(vm=f"kvm:{number}", pid=guest.pid, guest=guest)
            for event in history.events
        ]
        feed(state, history)
    with served(state.rows()) as url:
        yield url


def names(lines: list[str]) -> list[str]:
    """Return the first word of each line below the head."""
    head = next(number for number, line in enumerate(lines) if line.startswith("vm "))
    return [line.split()[0] for line in lines[head + 1 : -1] if line.strip()]


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """Yield a terminal with 200 guests, once they are shown."""
    with many_guests(200) as url, Terminal(tmp_path, "--url", url) as opened:
        opened.wait_for("200 guests")
        yield opened


def test_two_hundred_guests_are_sorted_paged_and_filtered(terminal: Terminal) -> None:
    lines = terminal.wait_for("10 critical, 190 ok")
    hostile, *others = names(lines)
    assert hostile == "\\x1b[2J\\x1b]0;own~"  # it is cut, and takes one line
    healthy = [f"web-{number:03}" for number in range(1, 12)]
    assert others == [*SKEWED, *healthy]
    assert [line.split()[1] for line in lines[2:-1]] == ["critical"] * 10 + ["ok"] * 11
    terminal.press("n")
    assert names(terminal.wait_for("by name"))[1:4] == ["web-000", "web-001", "web-002"]
    terminal.press("NPage")
    assert names(terminal.wait_for("web-030"))[0] == "web-020"
    terminal.press("End")
    assert names(terminal.wait_for("web-199"))[-1] == "web-199"
    terminal.press("Home")
    terminal.wait_for("web-000")
    terminal.press("/", "PROJECT-3")
    terminal.wait_for("filter: PROJECT-3_")
    terminal.press("Enter")
    assert names(terminal.wait_for("29 of 200 guests"))[:2] == ["web-003", "web-010"]
    terminal.press("v")
    assert names(terminal.wait_for("requested"))[1:4] == ["web-003", "0", "web-010"]
    terminal.press("Escape")
    terminal.wait_for("200 guests (1-20) by name")
    assert terminal.state("pane_title") != "owned"


def test_a_critical_guest_is_red(terminal: Terminal) -> None:
    screen = terminal.styled()
    of_the_skewed, _, healthy = screen.partition("web-001")
    _, red, skewed_ = of_the_skewed.partition("\x1b[31m")
    assert red
    assert skewed_.count("critical") == 10
    assert re.search(r"\x1b\[(0|39)m", skewed_.rpartition("web-180")[2])  # then it ends
    assert "\x1b[31m" not in healthy


@pytest.mark.parametrize(
    ("end", "status"), [("q", "0"), ("C-c", "130"), ("TERM", "143"), ("HUP", "129")]
)
def test_the_terminal_is_restored(terminal: Terminal, end: str, status: str) -> None:
    assert (terminal.state("alternate_on"), terminal.state("cursor_flag")) == ("1", "0")
    if end in ("TERM", "HUP"):
        (pid,) = subprocess.check_output(
            ["pgrep", "-P", terminal.state("pane_pid"), "-f", "tscwatch top"], text=True
        ).split()
        subprocess.run(["kill", f"-{end}", pid], check=True)
    else:
        terminal.press(end)
    terminal.wait_for(f"status {status}")
    terminal.wait_for("restored")
    assert (terminal.state("alternate_on"), terminal.state("cursor_flag")) == ("0", "1")


def test_a_smaller_terminal(terminal: Terminal) -> None:
    terminal.tmux("resize-window", "-x", "40", "-y", "10")
    lines = terminal.wait_for("200 guests (1-7)")
    assert [line[39:] for line in lines] == ["~"] * 10  # each line is cut, and none is wrapped
    assert names(lines)[1:] == SKEWED[:6]
    terminal.tmux("resize-window", "-x", "10", "-y", "2")
    terminal.wait_for("200 guest~")


def test_the_readmes_picture_can_be_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    pictures.draw_top(tmp_path, picture)
    committed = browser.first_pixel(DEPLOY / "top.png")
    assert browser.first_pixel(picture) == committed == (692, (0x1E, 0x1E, 0x1E))
    page = (tmp_path / "top.html").read_text()
    red = re.findall(r'<span style="font-weight: bold; color: #ff6b6b">([^<]*)', page)
    assert [line.split()[0] for line in "".join(red).splitlines()] == ["db-7", "mail-2"]


def test_without_a_terminal_and_whatever_proxy_there_is() -> None:
    with many_guests(3) as url:
        shown = run("top", "--url", f"{url}/", env={"http_proxy": "http://127.0.0.1:9"})
    assert [line.split()[0] for line in shown.stdout.splitlines()[:3]] == ["vm", "web-000", "1"]
    assert "\x1b" not in shown.stdout


def test_a_terminal_without_a_cursor(tmp_path: Path) -> None:
    with many_guests(3) as url, Terminal(tmp_path, "--url", url, term="dumb") as terminal:
        assert any(line.startswith("web-000 ") for line in terminal.wait_for("status 0"))


def test_three_guests_of_the_real_daemon_which_is_restarted(tmp_path: Path) -> None:
    config = f"listen: {{port: {free_port()}}}\n"
    daemon = partial(Observer, tmp_path, "--source", "ftrace", config=config)
    password = tmp_path / "web.yml"
    password.write_text(WEB[WEB.index("basic_auth_users") :])
    with daemon() as first, ExitStack() as stack:
        levels = {}
        for ppm, level in ((30, "info"), (100, "warning"), (1000, "critical")):
            steps = ("create-vcpu:0", "regs:0", f"set:0:{tiny_vmm.khz_above_host(ppm)}")
            vmm = stack.enter_context(tiny_vmm.process(*steps))
            levels[str(vmm.pid)] = level
        with Terminal(tmp_path, "--config", str(tmp_path / "tscwatch.yaml")) as terminal:
            for name, level in levels.items():
                terminal.wait_for(f"{name:<18} {level:<8} unscaled")
            ours = [name for name in names(terminal.lines()) if name in levels]
            assert ours == list(reversed(levels))
            first.stop()
            lines = terminal.wait_for("no running tscwatch answers")
            assert set(levels) <= set(names(lines))
            with daemon(config=config.replace("}", f", web_config: {password}}}")):
                terminal.wait_for("requires a password")  # no prompt in the middle of the screen
            with daemon():
                terminal.wait_for(" by severity")
            terminal.press("q")
            terminal.wait_for("status 0")


def test_a_daemon_with_tls_that_requires_a_password(tmp_path: Path) -> None:
    certificate(tmp_path)
    (tmp_path / "web.yml").write_text(WEB)
    file, netrc = tmp_path / "tscwatch.yaml", tmp_path / ".netrc"
    text = f"listen: {{port: {free_port()}, web_config: {tmp_path}/web.yml}}\n"
    top = partial(run, "top", "--config", str(file), env={"HOME": str(tmp_path)})
    with Observer(tmp_path, "--source", "ftrace", config=text):
        refused = top()
        assert refused.returncode == 12
        assert "add 'machine 127.0.0.1 login NAME password PASSWORD' to" in refused.stderr
        with Terminal(tmp_path, "--config", str(file)) as terminal:
            terminal.wait_for("Password of prometheus for https://127.0.0.1")
            terminal.press("open sesame", "Enter")
            terminal.wait_for(" by severity")
        netrc.write_text('machine 127.0.0.1 login prometheus password "open sesame"\n')
        assert top().returncode == 2  # others may read the file
        netrc.chmod(0o600)
        assert top().stdout.startswith("vm ")
        netrc.write_text("machine 127.0.0.1 login prometheus password wrong\n")
        assert "refuses the user name or the password" in top().stderr
        certificate(tmp_path)  # another one than that of the running daemon
        assert "CERTIFICATE_VERIFY_FAILED" in top().stderr
