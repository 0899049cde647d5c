"""TLS and passwords, with urllib and the real Prometheus as clients."""

from __future__ import annotations

import base64
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest

from tests.support.guests import PATIENCE_S, wait_for
from tests.support.observer import Observer
from tests.support.prometheus import free_port, query, server
from tscwatch.publish.web_config import bcrypt

SALT = "$2b$04$abcdefghijklmnopqrstuu"
WEB = f"""
tls_server_config: {{cert_file: cert.pem, key_file: key.pem, min_version: TLS13}}
basic_auth_users: {{prometheus: "{bcrypt("open sesame", SALT)}"}}
"""
PROMETHEUS = """
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: tscwatch
    scheme: https
    tls_config: {{ca_file: cert.pem, server_name: localhost}}
    basic_auth: {{username: prometheus, password: {password}}}
    static_configs: [{{targets: ["{target}"]}}]
"""


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Observer]:
    """Yield a daemon with TLS and a password; the certificate is ``cert.pem``."""
    certificate(tmp_path)
    (tmp_path / "web.yml").write_text(WEB)
    listen = f"listen: {{port: 0, web_config: {tmp_path}/web.yml}}\n"
    with Observer(tmp_path, "--source", "ftrace", config=listen) as observer:
        yield observer
    assert "Traceback" not in observer.log.read_text()


def certificate(directory: Path) -> None:
    """Make ``cert.pem`` for ``localhost``, with its key ``key.pem``."""
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    files = "-addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem"
    subprocess.run([*make.split(), *files.split()], check=True, capture_output=True, cwd=directory)


def port_of(observer: Observer) -> int:
    return int(observer.address.partition("https://127.0.0.1:")[2])


def status(
    observer: Observer, directory: Path, password: Optional[str], path: str = "/metrics"
) -> int:
    """Return the HTTP status of a path."""
    headers = {}
    if password is not None:
        token = base64.b64encode(f"prometheus:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {token}"
    url = f"https://localhost:{port_of(observer)}{path}"
    trust = ssl.create_default_context(cafile=str(directory / "cert.pem"))
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=PATIENCE_S, context=trust) as page:
            return int(page.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_a_client_with_the_password_is_answered(guarded: Observer, tmp_path: Path) -> None:
    assert status(guarded, tmp_path, None) == 401
    assert status(guarded, tmp_path, "open says me") == 401
    for _ in range(2):  # the second time, the daemon finds the password in its cache
        assert status(guarded, tmp_path, "open sesame") == 200
    assert status(guarded, tmp_path, "") == 401


def test_only_the_health_needs_no_password(guarded: Observer, tmp_path: Path) -> None:
    wait_for(lambda: status(guarded, tmp_path, None, "/readyz") == 200, "it to be ready")
    assert status(guarded, tmp_path, None, "/healthz") == 200
    assert status(guarded, tmp_path, "wrong", "/healthz") == 200
    for path in ("/", "/vms", "/else", "/healthz/", "/healthz/../metrics", "//metrics"):
        assert status(guarded, tmp_path, None, path) == 401


def test_a_silent_or_a_plain_client_keeps_nobody_waiting(guarded: Observer, tmp_path: Path) -> None:
    address = "127.0.0.1", port_of(guarded)
    with socket.create_connection(address), socket.create_connection(address) as plain:
        plain.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert status(guarded, tmp_path, "open sesame") == 200


def test_a_client_may_hang_up(guarded: Observer, tmp_path: Path) -> None:
    """The fixture checks that the log has no traceback."""
    trust = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    address = "127.0.0.1", port_of(guarded)
    for _ in range(50):
        client = trust.wrap_socket(socket.create_connection(address), server_hostname="localhost")
        with client:
            client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert status(guarded, tmp_path, "open sesame") == 200


@pytest.mark.parametrize(("password", "answered"), [("open sesame", "1"), ("wrong", "0")])
def test_the_real_prometheus(
    guarded: Observer, tmp_path: Path, password: str, answered: str
) -> None:
    text = PROMETHEUS.format(password=password, target=f"127.0.0.1:{port_of(guarded)}")
    (tmp_path / "prometheus.yml").write_text(text)
    address = f"127.0.0.1:{free_port()}"
    options = ("--config.file=prometheus.yml", "--storage.tsdb.path=tsdb")
    with server(tmp_path, "prometheus", *options, f"--web.listen-address={address}"):
        wait_for(lambda: up(address) == answered, f"up to be {answered}")


def up(address: str) -> Optional[str]:
    """Return the value of ``up`` in the Prometheus at an address, once it has scraped."""
    try:
        series = query(address, "up")
    except OSError:
        return None
    return str(series[0]["value"][1]) if series else None
