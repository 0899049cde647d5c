"""Who may scrape: TLS and basic authentication, as Prometheus' exporters have them.

The file is theirs: ``web.yml`` of the exporter toolkit (docs/web-configuration.md there), of which
``tls_server_config`` and ``basic_auth_users`` are known here.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import hmac
import re
import ssl
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from tscwatch.config import BadValue, file_path, one_of, read_settings
from tscwatch.errors import ConfigError

_App = Callable[..., Iterable[bytes]]
_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_CLIENT_AUTH = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
MIN_VERSIONS = tuple(_VERSIONS)
CLIENT_AUTH_TYPES = tuple(_CLIENT_AUTH)


class WebConfig(NamedTuple):
    """What a ``web.yml`` says."""

    cert_file: Optional[Path] = None
    key_file: Optional[Path] = None
    client_ca_file: Optional[Path] = None
    client_auth_type: str = "NoClientCert"
    min_version: str = "TLS12"
    users: Mapping[str, str] = {}
    """bcrypt hashes by name."""

    def tls(self) -> Optional[ssl.SSLContext]:
        """None where it is not asked for.

        :raises ConfigError: a file cannot be used.
        """
        if self.cert_file is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = _VERSIONS[self.min_version]
        try:
            context.load_cert_chain(self.cert_file, self.key_file)
            if self.client_ca_file is not None:
                context.load_verify_locations(self.client_ca_file)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(
                f"the TLS files cannot be used ({error}): {self.cert_file}, {self.key_file}"
            ) from error
        context.verify_mode = _CLIENT_AUTH[self.client_auth_type]
        return context

    def protect(self, app: _App) -> _App:
        """The application for those who say their name and password."""
        if not self.users:
            return app
        check = _Passwords(self.users)

        def answer(environ: dict[str, Any], start: Callable[..., object]) -> Iterable[bytes]:
            if check.are_right(environ.get("HTTP_AUTHORIZATION", "")):
                return app(environ, start)
            start("401 Unauthorized", [("WWW-Authenticate", "Basic"), ("Content-Length", "0")])
            return []

        return answer


class _Passwords:
    """bcrypt is slow on purpose, so what was right once is known again without it."""

    def __init__(self, hashes: Mapping[str, str]) -> None:
        self._hashes = hashes
        self._lock = threading.Lock()
        self._known = ""

    def are_right(self, header: str) -> bool:
        with self._lock:
            if self._known and hmac.compare_digest(header.encode(), self._known.encode()):
                return True
            name, password = _credentials(header)
            # A name that is not known takes as long as one that is.
            wanted = self._hashes.get(name) or next(iter(self._hashes.values()))
            right = hmac.compare_digest(bcrypt(password, wanted), wanted) and name in self._hashes
            if right:
                self._known = header
            return right


def _credentials(header: str) -> tuple[str, str]:
    scheme, _, encoded = header.partition(" ")
    try:
        text = base64.b64decode(encoded, validate=True).decode() if scheme == "Basic" else ""
    except (binascii.Error, ValueError):
        text = ""
    name, _, password = text.partition(":")
    return name, password


def bcrypt(password: str, setting: str) -> str:
    """crypt(3) by libxcrypt, which every distribution's login uses; the caller holds a lock.

    :param setting: a hash, or its beginning up to the salt.
    """
    library = _libcrypt()
    library.crypt.restype = ctypes.c_char_p
    made = library.crypt(password.encode(), setting.encode())
    return made.decode() if made else "*"


def _libcrypt() -> ctypes.CDLL:
    for name in ("libcrypt.so.2", "libcrypt.so.1"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ConfigError("basic_auth_users needs libxcrypt: install libcrypt1 or libxcrypt")


def load_web_config(path: Optional[Path]) -> WebConfig:
    """Read a ``web.yml``; no guard where there is none.

    :raises ConfigError: it cannot be read or used.
    """
    if path is None:
        return WebConfig()
    # As in the exporter toolkit, the files in it are looked for beside it.
    settings: dict[str, Any] = {
        name: path.parent / value if isinstance(value, Path) else value
        for name, value in read_settings(path, _WEB_KEYS)
    }
    if ("cert_file" in settings) != ("key_file" in settings):
        raise ConfigError(f"{path}: cert_file and key_file go together")
    return WebConfig(**settings)


def _users(value: Any) -> dict[str, str]:
    """Hashes as htpasswd -B and the exporter toolkit's documentation make them."""
    is_mapping = isinstance(value, dict) and bool(value)
    if not is_mapping or not all(isinstance(name, str) for name in value):
        raise BadValue("must be a mapping of names to bcrypt hashes")
    for name, hashed in value.items():
        if not isinstance(hashed, str) or not re.fullmatch(r"\$2[aby]\$\d\d\$[./\w]{53}", hashed):
            raise BadValue(
                f"of {name} must be a bcrypt hash: make one with 'htpasswd -nBC 10 {name}'"
            )
    return dict(value)


_WEB_KEYS: dict[str, Any] = {
    "tls_server_config": {
        "cert_file": ("cert_file", file_path),
        "key_file": ("key_file", file_path),
        "client_ca_file": ("client_ca_file", file_path),
        "client_auth_type": ("client_auth_type", one_of(*CLIENT_AUTH_TYPES)),
        "min_version": ("min_version", one_of(*MIN_VERSIONS)),
    },
    "basic_auth_users": ("users", _users),
}
