"""Who may read the port: certificates, passwords, and what a ``web.yml`` may contain.

The certificates are valid until the year 2100. ``authority.pem`` has issued ``server.pem`` and
``client.pem``; another authority of the same name has issued ``stranger.pem``.
"""

from __future__ import annotations

import base64
import re
import shutil
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any, Optional

import pytest
from prometheus_client import CollectorRegistry

from tscwatch.errors import ConfigError
from tscwatch.publish import web, web_config
from tscwatch.publish.web_config import WebConfig, bcrypt, load_web_config

CERTIFICATES = Path(__file__).parent / "certificates"
TLS = "tls_server_config:\n  cert_file: server.pem\n  key_file: server.pem\n"
REQUIRED = f"{TLS}  client_auth_type: RequireAndVerifyClientCert\n"
HASH = "$2y$10$" + "a" * 53
SALT = "$2b$04$abcdefghijklmnopqrstuu"


def loaded(directory: Path, text: str) -> WebConfig:
    """Write a ``web.yml`` beside the certificates, and load it."""
    shutil.copytree(CERTIFICATES, directory, dirs_exist_ok=True)
    (directory / "web.yml").write_text(text)
    return load_web_config(directory / "web.yml")


@contextmanager
def serving(config: WebConfig) -> Iterator[int]:
    """Serve the port of tscwatch; yield its number."""
    application = web.application(CollectorRegistry(), web.Heartbeat(), list)
    with web.serving(application, config, "127.0.0.1", 0, lambda: None) as port:
        yield port


def answer(
    port: int, certificate: Optional[str] = None, tls: Optional[ssl.TLSVersion] = None
) -> Optional[int]:
    """Return the HTTP status of ``/metrics``; None if the server refuses the TLS connection.

    :param certificate: the client's; None for none.
    :param tls: the client's latest version of TLS; None for the latest that there is.
    """
    trust = ssl.create_default_context(cafile=str(CERTIFICATES / "authority.pem"))
    if certificate is not None:
        trust.load_cert_chain(CERTIFICATES / certificate)
    if tls is not None:
        trust.maximum_version = tls
    with closing(HTTPSConnection("127.0.0.1", port, timeout=60, context=trust)) as client:
        try:
            client.request("GET", "/metrics")
            return client.getresponse().status
        except (ssl.SSLError, ConnectionError):
            return None


@pytest.mark.parametrize(
    ("policy", "answers"),
    [
        ("", (200, 200, 200)),
        ("  client_auth_type: NoClientCert\n", (200, 200, 200)),
        (
            "  client_auth_type: VerifyClientCertIfGiven\n  client_ca_file: authority.pem\n",
            (200, 200, None),
        ),
        (
            "  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: authority.pem\n",
            (None, 200, None),
        ),
    ],
)
def test_which_certificates_are_accepted(
    tmp_path: Path, policy: str, answers: tuple[Optional[int], ...]
) -> None:
    with serving(loaded(tmp_path, TLS + policy)) as port:
        found = [answer(port, file) for file in (None, "client.pem", "stranger.pem")]
    assert tuple(found) == answers


@pytest.mark.parametrize(
    ("versions", "answers"),
    [
        ("", (200, 200)),
        ("  min_version: TLS12\n", (200, 200)),
        ("  min_version: TLS13\n", (None, 200)),
    ],
)
def test_which_versions_of_tls_are_accepted(
    tmp_path: Path, versions: str, answers: tuple[Optional[int], ...]
) -> None:
    with serving(loaded(tmp_path, TLS + versions)) as port:
        found = [answer(port, tls=tls) for tls in (ssl.TLSVersion.TLSv1_2, None)]
    assert tuple(found) == answers


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tls_server_config: {cert_file: c.pem}", "needs cert_file and key_file"),
        ("tls_server_config: {key_file: k.pem}", "needs cert_file and key_file"),
        ("tls_server_config: {min_version: TLS13}", "needs cert_file and key_file"),
        ("tls_server_config: {client_ca_file: ca.pem}", "needs cert_file and key_file"),
        (
            "tls_server_config: {client_auth_type: RequireAndVerifyClientCert}",
            "needs cert_file and key_file",
        ),
        (f"{TLS}  client_ca_file: ca.pem", "client_ca_file needs a client_auth_type"),
        (
            f"{TLS}  client_ca_file: ca.pem\n  client_auth_type: NoClientCert",
            "client_ca_file needs a client_auth_type",
        ),
        (
            f"{TLS}  client_auth_type: VerifyClientCertIfGiven",
            "VerifyClientCertIfGiven needs client_ca_file",
        ),
        (REQUIRED, "RequireAndVerifyClientCert needs client_ca_file"),
        (
            f"{TLS}  client_auth_type: RequireAnyClientCert",
            "one of NoClientCert, VerifyClientCertIfGiven, RequireAndVerifyClientCert, not",
        ),
        ("tls_server_config: {cert_file: 7}", "web.yml:1: tls_server_config.cert_file"),
        ("tls_server_config: {min_version: SSL3}", "TLS12, TLS13"),
        ("tls_server_config: {ciphers: all}", "web.yml:1: tls_server_config.ciphers is not a"),
        ("basic_auth_users: [a]", "names to bcrypt hashes"),
        ("basic_auth_users: {}", "names to bcrypt hashes"),
        (f"basic_auth_users: {{7: {HASH}}}", "a name that is a number in quotes"),
        ("basic_auth_users: {a: secret}", "htpasswd -nBC 10 a"),
        ("basic_auth_users: {a: 7}", "htpasswd -nBC 10 a"),
        (f"basic_auth_users: {{a: {HASH}, b: {HASH}secret}}", "htpasswd -nBC 10 b"),
    ],
)
def test_a_web_config_that_cannot_be_used(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as raised:
        loaded(tmp_path, f"{text}\n")
    assert reason in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_web_config_in_the_format_of_the_exporters(tmp_path: Path) -> None:
    files = "cert_file: server.pem\n  key_file: /etc/k.pem\n  client_ca_file: ca.pem\n"
    policy = "client_auth_type: VerifyClientCertIfGiven\n  min_version: TLS13\n"
    text = f"tls_server_config:\n  {files}  {policy}basic_auth_users: {{a: {HASH}, '7': {HASH}}}\n"
    assert loaded(tmp_path, text) == WebConfig(
        tmp_path / "server.pem",
        Path("/etc/k.pem"),
        tmp_path / "ca.pem",
        "VerifyClientCertIfGiven",
        "TLS13",
        {"a": HASH, "7": HASH},
    )


def test_without_a_web_config_there_is_no_tls() -> None:
    assert load_web_config(None).tls() is None


@pytest.mark.parametrize("missing", ["cert_file", "key_file", "client_ca_file"])
@pytest.mark.parametrize("content", [None, "no PEM"])
def test_a_tls_file_that_cannot_be_used_is_named(
    tmp_path: Path, missing: str, content: Optional[str]
) -> None:
    if content is not None:
        (tmp_path / "bad.pem").write_text(content)
    text = f"{REQUIRED}  client_ca_file: authority.pem\n"
    bad = loaded(tmp_path, re.sub(rf"{missing}: \S+", f"{missing}: bad.pem", text))
    with pytest.raises(ConfigError, match=r"TLS files cannot be used .*/bad\.pem"):
        bad.tls()


USERS = {"ann": bcrypt("open: sesame", SALT), "bob": bcrypt("other", SALT)}


def basic(credentials: str) -> str:
    return f"Basic {base64.b64encode(credentials.encode()).decode()}"


def status(application: Any, header: Optional[str], path: str = "/metrics") -> str:
    """Return the HTTP status of a request with an ``Authorization`` header; None for none."""
    answers: list[tuple[str, dict[str, str]]] = []
    environ = {"PATH_INFO": path} | ({} if header is None else {"HTTP_AUTHORIZATION": header})
    body = application(environ, lambda line, headers: answers.append((line, dict(headers))))
    ((line, headers),) = answers
    assert (headers.get("WWW-Authenticate") == "Basic") == (line == "401 Unauthorized")
    assert list(body) == ([b"page"] if line == "200 OK" else [])
    return line.split()[0]


def page(_environ: object, start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b"page"]


WRONG = [
    None,
    "",
    basic(""),
    basic("ann"),
    basic("ann:"),
    basic("ann:other"),
    basic("bob:open: sesame"),
    basic("eve:open: sesame"),
    basic(f"ann:{USERS['ann']}"),
    basic("ann:open: sesame").replace("Basic", "Bearer"),
    basic("ann:open: sesame").replace("Basic ", ""),
    "Basic \u00e9",
    "Basic !",
    "Basic /w==",
]


def test_who_has_the_password_is_answered() -> None:
    guarded = WebConfig(users=USERS).protect(page, ())
    for accepted in ("ann:open: sesame", "ann:open: sesame", "bob:other", "ann:open: sesame"):
        assert status(guarded, basic(accepted)) == "200"
        assert {status(guarded, header) for header in WRONG} == {"401"}


def test_only_public_paths_need_no_password() -> None:
    guarded = WebConfig(users=USERS).protect(page, ("/healthz",))
    assert status(guarded, None, "/healthz") == "200"
    for path in ("/", "/metrics", "/healthz/", "/healthz/../metrics", ""):
        assert status(guarded, None, path) == "401"
    assert WebConfig().protect(page, ()) is page


def test_a_password_is_hashed_once_and_for_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time to answer must not reveal which names there are."""
    hashed: list[str] = []

    def counted(password: str, setting: str) -> str:
        hashed.append(password)
        return bcrypt(password, setting)

    monkeypatch.setattr(web_config, "bcrypt", counted)
    answered = partial(status, WebConfig(users=USERS).protect(page, ()))
    assert [answered(basic("ann:open: sesame")) for _ in range(3)] == ["200"] * 3
    assert hashed == ["open: sesame"]
    assert [answered(basic(f"{name}:x")) for name in ("ann", "eve")] == ["401"] * 2
    assert hashed[1:] == ["x", "x"]
