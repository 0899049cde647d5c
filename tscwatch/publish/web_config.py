"""TLS and basic authentication of the HTTP port, configured as for Prometheus' exporters.

The file is the ``web.yml`` of the exporter toolkit (``docs/web-configuration.md`` in
github.com/prometheus/exporter-toolkit).  Of its keys, ``tls_server_config`` and
``basic_auth_users`` are supported.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import hmac
import re
import ssl
import threading
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from tscwatch.config import BadValue, file_path, one_of, read_settings
from tscwatch.errors import ConfigError

_MIN_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_CLIENT_AUTH_TYPES = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}

_Application = Callable[..., Iterable[bytes]]


class WebConfig(NamedTuple):
    """The settings of a ``web.yml``; by default neither TLS nor authentication."""

    cert_file: Optional[Path] = None
    key_file: Optional[Path] = None
    client_ca_file: Optional[Path] = None
    client_auth_type: str = "NoClientCert"
    min_version: str = "TLS12"
    users: Mapping[str, str] = {}
    """The bcrypt hash of each user's password, by the user's name."""

    def tls(self) -> Optional[ssl.SSLContext]:
        """Return the context for the server's socket; None for plain HTTP.

        :raises ConfigError: a file cannot be used.
        """
        if self.cert_file is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = _MIN_VERSIONS[self.min_version]
        try:
            context.load_cert_chain(self.cert_file, self.key_file)
            if self.client_ca_file is not None:
                context.load_verify_locations(self.client_ca_file)
        except OSError as error:  # the base class of ssl.SSLError
            files = [self.cert_file, self.key_file, self.client_ca_file]
            named = ", ".join(str(file) for file in files if file is not None)
            raise ConfigError(f"the TLS files cannot be used ({error}): {named}") from error
        context.verify_mode = _CLIENT_AUTH_TYPES[self.client_auth_type]
        return context

    def protect(self, application: _Application, public: Sequence[str]) -> _Application:
        """Return a WSGI application that requires the password of one of the users.

        Without users, this is the application itself.

        :param public: the paths that need no password.
        """
        if not self.users:
            return application
        authenticator = _Authenticator(self.users)

        def respond(
            environ: dict[str, Any], start_response: Callable[..., object]
        ) -> Iterable[bytes]:
            if environ["PATH_INFO"] in public or authenticator.accepts(
                environ.get("HTTP_AUTHORIZATION", "")
            ):
                return application(environ, start_response)
            headers = [("WWW-Authenticate", "Basic"), ("Content-Length", "0")]
            start_response("401 Unauthorized", headers)
            return []

        return respond


def load_web_config(path: Optional[Path]) -> WebConfig:
    """Read a ``web.yml``.

    Relative file names in it are relative to its directory, as in the exporter toolkit.

    :param path: None for the defaults.
    :raises ConfigError: it cannot be read or used.
    """
    if path is None:
        return WebConfig()
    settings: dict[str, Any] = {
        name: path.parent / value if isinstance(value, Path) else value
        for name, value in read_settings(path, _KEYS)
    }
    web_config = WebConfig(**settings)
    _check_tls(path, settings.keys() - {"users"}, web_config.client_auth_type)
    return web_config


def _check_tls(path: Path, keys: AbstractSet[str], client_auth_type: str) -> None:
    """Check that each setting has an effect, and that clients that must be verified can be.

    :param keys: the keys of ``tls_server_config`` that are set.
    """
    if keys and not {"cert_file", "key_file"} <= keys:
        raise ConfigError(f"{path}: tls_server_config needs cert_file and key_file")
    verifies = _CLIENT_AUTH_TYPES[client_auth_type] != ssl.CERT_NONE
    if verifies and "client_ca_file" not in keys:
        raise ConfigError(f"{path}: client_auth_type {client_auth_type} needs client_ca_file")
    if "client_ca_file" in keys and not verifies:
        raise ConfigError(
            f"{path}: client_ca_file needs a client_auth_type: with RequireAndVerifyClientCert, "
            "only clients with a certificate of that authority are served"
        )


def _users(value: Any) -> dict[str, str]:
    """Check a mapping of names to hashes in the format of ``htpasswd -B``."""
    is_mapping = isinstance(value, dict) and bool(value)
    if not is_mapping or not all(isinstance(name, str) for name in value):
        raise BadValue(
            "must be a mapping of names to bcrypt hashes, with a name that is a number in quotes"
        )
    for name, hashed in value.items():
        if not isinstance(hashed, str) or not re.fullmatch(r"\$2[aby]\$\d\d\$[./\w]{53}", hashed):
            raise BadValue(
                f"must have a bcrypt hash for {name}: make one with 'htpasswd -nBC 10 {name}'"
            )
    return dict(value)


_KEYS: dict[str, Any] = {
    "tls_server_config": {
        "cert_file": ("cert_file", file_path),
        "key_file": ("key_file", file_path),
        "client_ca_file": ("client_ca_file", file_path),
        "client_auth_type": ("client_auth_type", one_of(*_CLIENT_AUTH_TYPES)),
        "min_version": ("min_version", one_of(*_MIN_VERSIONS)),
    },
    "basic_auth_users": ("users", _users),
}


class _Authenticator:
    """Checks ``Authorization`` headers.

    bcrypt is slow by design, so the last header that was accepted is kept and compared first.
    """

    def __init__(self, hashes: Mapping[str, str]) -> None:
        self._hashes = hashes
        self._lock = threading.Lock()
        self._accepted = ""

    def accepts(self, header: str) -> bool:
        with self._lock:
            if self._accepted and hmac.compare_digest(header.encode(), self._accepted.encode()):
                return True
            name, password = _credentials(header)
            # For an unknown name, hash as well: the time must not reveal which names exist.
            expected = self._hashes.get(name) or next(iter(self._hashes.values()))
            is_password = hmac.compare_digest(bcrypt(password, expected), expected)
            if not is_password or name not in self._hashes:
                return False
            self._accepted = header
            return True


def _credentials(header: str) -> tuple[str, str]:
    """Return name and password of a basic ``Authorization`` header; both empty if it is not one."""
    scheme, _, encoded = header.partition(" ")
    try:
        text = base64.b64decode(encoded, validate=True).decode() if scheme == "Basic" else ""
    except (binascii.Error, ValueError):
        text = ""
    name, _, password = text.partition(":")
    return name, password


def bcrypt(password: str, setting: str) -> str:
    """Return the hash of a password, by libxcrypt's crypt(3); ``*`` or ``*0`` if that fails.

    crypt(3) returns a static buffer, so the caller must not call this from two threads at once.

    :param setting: a hash, or its beginning up to the end of the salt.
    :raises ConfigError: libxcrypt is not installed.
    """
    library = _libcrypt()
    library.crypt.restype = ctypes.c_char_p
    hashed = library.crypt(password.encode(), setting.encode())
    return hashed.decode() if hashed else "*"


def _libcrypt() -> ctypes.CDLL:
    for name in ("libcrypt.so.2", "libcrypt.so.1"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ConfigError("basic_auth_users needs libxcrypt: install libcrypt1 or libxcrypt")
