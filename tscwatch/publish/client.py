"""Fetches ``/vms`` from the running daemon: finds its address, trusts it, and logs in.

The configuration has the address and the certificate, but of a password only its hash.  If the
daemon requires one, it comes from ``~/.netrc``, as for curl(1), or is prompted for.
"""

from __future__ import annotations

import base64
import getpass
import http.client
import ipaddress
import json
import netrc
import re
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Optional

from tscwatch.config import Config
from tscwatch.errors import ConfigError, DaemonSilent
from tscwatch.publish.web_config import load_web_config

_TIMEOUT_S = 3
_MAX_BYTES = 64 << 20
"""Of an answer; with the default limits, a daemon's is at most some MiB."""
_PARTIAL_CHAIN = 0x80000
"""``ssl.VERIFY_X509_PARTIAL_CHAIN`` of Python 3.10: a certificate that was issued by an authority
may be trusted by itself."""


class Client:
    """The running daemon, as seen by a user.

    :param url: its address, without a path.
    :param tls: None trusts the system's authorities.
    :param user: the name to log in with, if the daemon requires it; empty if not known.
    """

    def __init__(self, url: str, tls: Optional[ssl.SSLContext] = None, user: str = "") -> None:
        self.url = url.rstrip("/")
        self._user = user
        self._authorization = ""
        # A proxy of the environment is for the network, not for this host's own port.
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if tls is not None:
            handlers.append(urllib.request.HTTPSHandler(context=tls))
        self._opener = urllib.request.build_opener(*handlers)

    def vms(self, may_prompt: bool) -> Any:
        """Return what :meth:`tscwatch.publish.state.State.rows` returns, unchecked.

        :param may_prompt: for a user name and a password, if standard input is a terminal.
        :raises ConfigError: ``~/.netrc`` is needed, and cannot be read.
        :raises DaemonSilent: nothing answers there, or it is not tscwatch, or it refuses the
            password.
        """
        try:
            try:
                return self._get()
            except urllib.error.HTTPError as error:
                with error:
                    if error.code != 401:
                        raise
                if self._authorization:
                    raise DaemonSilent(
                        f"{self.url} refuses the user name or the password: correct it in ~/.netrc"
                    ) from None
            self._authorization = _basic(*self._login(may_prompt))
            return self.vms(may_prompt)
        except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise DaemonSilent(
                f"no running tscwatch answers at {self.url} ({reason}): start it with "
                "'tscwatch run', or give its address with --url"
            ) from error

    def _get(self) -> Any:
        request = urllib.request.Request(f"{self.url}/vms")
        if self._authorization:
            # Not repeated to an address to which it redirects.
            request.add_unredirected_header("Authorization", self._authorization)
        with self._opener.open(request, timeout=_TIMEOUT_S) as response:
            return json.loads(response.read(_MAX_BYTES))

    def _login(self, may_prompt: bool) -> tuple[str, str]:
        """Return a user name and a password."""
        host = urllib.parse.urlsplit(self.url).hostname or ""
        try:
            found = netrc.netrc().authenticators(host)
        except FileNotFoundError:
            found = None
        except (OSError, ValueError, netrc.NetrcParseError) as error:
            raise ConfigError(f"~/.netrc cannot be used ({error})") from error
        if found is not None:
            return found[0], found[2] or ""
        if not (may_prompt and sys.stdin.isatty()):
            raise DaemonSilent(
                f"{self.url} requires a password: add 'machine {host} login NAME password "
                "PASSWORD' to ~/.netrc"
            )
        try:
            user = self._user or getpass.getpass(f"User name for {self.url} (not shown): ")
            return user, getpass.getpass(f"Password of {user} for {self.url}: ")
        except EOFError:
            raise DaemonSilent(f"{self.url} requires a password: none was given") from None


def from_config(settings: Config) -> Client:
    """Return the daemon that runs on this host with these settings.

    :raises ConfigError: they do not determine it.
    """
    if settings.port == 0:
        raise ConfigError(
            "listen.port is 0, so the port is known only to the running daemon: give the address "
            "that it has logged with --url"
        )
    web = load_web_config(settings.web_config)
    address = ipaddress.ip_address(settings.address)
    if address.is_unspecified:  # it listens on all addresses
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    host = f"[{address}]" if address.version == 6 else str(address)
    scheme = "http" if web.cert_file is None else "https"
    return Client(
        f"{scheme}://{host}:{settings.port}",
        None if web.cert_file is None else _trust(web.cert_file),
        next(iter(web.users)) if len(web.users) == 1 else "",
    )


def _trust(cert_file: Path) -> ssl.SSLContext:
    """Return a context that trusts the first certificate of a file, and no other.

    That is the daemon's own, so it need not have the name of the address at which it listens.

    :raises ConfigError: there is none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= _PARTIAL_CHAIN
    try:
        text = cert_file.read_text(encoding="ascii", errors="replace")
        pem = re.search(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", text, re.DOTALL)
        context.load_verify_locations(cadata=pem[0] if pem else "")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{cert_file}: the daemon's certificate cannot be used ({error}): run as a user who "
            "may read it, or give the daemon's address with --url"
        ) from error
    return context


def _basic(user: str, password: str) -> str:
    """Return a header for basic authentication (RFC 7617)."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
