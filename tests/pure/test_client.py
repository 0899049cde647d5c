"""``tscwatch top`` finds the daemon, trusts its certificate and logs in, over a real connection."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

import pytest

from tests.pure.test_web_config import SALT, TLS, loaded, serving
from tscwatch import config
from tscwatch.errors import ConfigError, DaemonSilent
from tscwatch.publish.client import Client, from_config
from tscwatch.publish.web_config import bcrypt

ONE = f'{TLS}basic_auth_users: {{ann: "{bcrypt("sesame", SALT)}"}}\n'
TWO = ONE.replace("}\n", f', bob: "{bcrypt("other", SALT)}"}}\n')
CORRECT = "machine 127.0.0.1 login bob password other\n"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the user's home directory, which is empty."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def write_netrc(home: Path, text: str) -> None:
    (home / ".netrc").write_text(text)
    (home / ".netrc").chmod(0o600)


def client(tmp_path: Path, port: int) -> Client:
    """Return the client for a daemon at a port, by the daemon's configuration."""
    file = tmp_path / "tscwatch.yaml"
    file.write_text(f"listen: {{port: {port}, web_config: {tmp_path}/web.yml}}\n")
    return from_config(config.load(file))


def test_a_daemon_without_tls_and_password(tmp_path: Path) -> None:
    with serving(loaded(tmp_path, "")) as port:
        found = client(tmp_path, port)
        assert found.url == f"http://127.0.0.1:{port}"
        assert found.vms(may_prompt=False) == []
        slash = Client(f"http://127.0.0.1:{port}/")
        assert (slash.url, slash.vms(may_prompt=False)) == (found.url, [])
        with pytest.raises(DaemonSilent, match=rf"answers at .*:{port}/else \(Not Found\)"):
            Client(f"http://127.0.0.1:{port}/else").vms(may_prompt=False)
    with pytest.raises(DaemonSilent, match="start it with 'tscwatch run'"):
        found.vms(may_prompt=False)


def test_only_the_certificate_of_the_configuration_is_trusted(tmp_path: Path) -> None:
    served = loaded(tmp_path, TLS)
    with serving(served) as port:
        assert client(tmp_path, port).url == f"https://127.0.0.1:{port}"
        assert client(tmp_path, port).vms(may_prompt=False) == []
        with pytest.raises(DaemonSilent, match="CERTIFICATE_VERIFY_FAILED"):
            Client(f"https://127.0.0.1:{port}").vms(may_prompt=False)
    file = tmp_path / "client.pem"  # of the same authority, but not the one that is configured
    other = served._replace(cert_file=file, key_file=file)
    with serving(other) as port, pytest.raises(DaemonSilent, match="VERIFY_FAILED"):
        client(tmp_path, port).vms(may_prompt=False)


@pytest.mark.parametrize(
    ("netrc", "reason"),
    [
        (None, r"add 'machine 127\.0\.0\.1 login NAME"),
        (CORRECT.replace("127.0.0.1", "192.0.2.1"), r"add 'machine 127\.0\.0\.1 login NAME"),
        (CORRECT.replace("other", "sesame"), "refuses the user name or the password"),
        (CORRECT.replace("bob", "eve"), "refuses the user name or the password"),
        ("machine 127.0.0.1 login bob\n", "refuses the user name or the password"),
    ],
)
def test_a_password_that_is_missing_or_wrong(
    tmp_path: Path, home: Path, netrc: str | None, reason: str
) -> None:
    if netrc is not None:
        write_netrc(home, netrc)
    with serving(loaded(tmp_path, TWO)) as port, pytest.raises(DaemonSilent, match=reason):
        client(tmp_path, port).vms(may_prompt=False)


def test_the_password_is_in_netrc(tmp_path: Path, home: Path) -> None:
    write_netrc(home, CORRECT)
    with serving(loaded(tmp_path, TWO)) as port:
        found = client(tmp_path, port)
        assert [found.vms(may_prompt=False) for _ in range(2)] == [[], []]
        write_netrc(home, "nonsense\n")
        assert found.vms(may_prompt=False) == []
        with pytest.raises(ConfigError, match="netrc cannot be used"):
            client(tmp_path, port).vms(may_prompt=False)


@pytest.mark.parametrize(
    ("users", "prompts"),
    [
        (ONE, ["Password of ann for URL: "]),
        (TWO, ["User name for URL (not shown): ", "Password of ann for URL: "]),
    ],
)
def test_the_user_is_prompted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, users: str, prompts: list[str]
) -> None:
    """The name only if the configuration has several."""
    shown: list[str] = []

    def answer(prompt: str) -> str:
        shown.append(prompt)
        return "ann" if prompt.startswith("User") else "sesame"

    monkeypatch.setattr(getpass, "getpass", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with serving(loaded(tmp_path, users)) as port:
        found = client(tmp_path, port)
        with pytest.raises(DaemonSilent, match="netrc"):
            found.vms(may_prompt=False)
        assert [found.vms(may_prompt=True) for _ in range(2)] == [[], []]
    assert [prompt.replace(found.url, "URL") for prompt in shown] == prompts


def test_a_prompt_that_is_not_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(_prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr(getpass, "getpass", end)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with serving(loaded(tmp_path, ONE)) as port, pytest.raises(DaemonSilent, match="none was"):
        client(tmp_path, port).vms(may_prompt=True)
