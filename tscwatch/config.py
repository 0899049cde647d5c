"""The configuration: YAML, every key optional, each fault named with file, key and line."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Literal, NamedTuple, Optional, get_args

import yaml

from tscwatch.capture import SourceName
from tscwatch.errors import ConfigError
from tscwatch.guard import CLIENT_AUTH_TYPES, MIN_VERSIONS, Guard
from tscwatch.model import Kind

LogFormat = Literal["text", "json"]

TOLERATED: tuple[Kind, ...] = ("vcpu_skew", "configured", "readback", "unscaled", "changed")
"""The kinds that are a difference of two frequencies."""


class Config(NamedTuple):
    """Every setting with its default."""

    source: SourceName = "auto"
    address: str = "127.0.0.1"
    port: int = 9978
    web_config: Optional[Path] = None
    tolerance_ppm: Mapping[Kind, float] = MappingProxyType(dict.fromkeys(TOLERATED, 0.0))
    max_vms: int = 1024
    max_vcpus: int = 16384
    log_format: LogFormat = "text"


class _Fault(Exception):
    """What is wrong with a value."""


def load(path: Optional[Path]) -> Config:
    """Read a configuration file; the defaults where there is none.

    :raises ConfigError: it cannot be read or used.
    """
    if path is None:
        return Config()
    settings = dict(_read(path, _KEYS))
    tolerance_ppm = {kind: settings.pop(kind, 0.0) for kind in TOLERATED}
    return Config(tolerance_ppm=tolerance_ppm, **settings)


def load_guard(path: Optional[Path]) -> Guard:
    """Read a ``web.yml``; no guard where there is none.

    :raises ConfigError: it cannot be read or used.
    """
    if path is None:
        return Guard()
    # As in the exporter toolkit, the files in it are looked for beside it.
    settings: dict[str, Any] = {
        name: path.parent / value if isinstance(value, Path) else value
        for name, value in _read(path, _WEB_KEYS)
    }
    if ("cert_file" in settings) != ("key_file" in settings):
        raise ConfigError(f"{path}: cert_file and key_file go together")
    return Guard(**settings)


def _read(path: Path, known: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML ({_problem(error)})") from error
    if node is not None:  # else nothing but comments
        yield from _settings(path, node, "", known)


def _settings(
    path: Path, node: yaml.Node, prefix: str, known: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    where = f"{path}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{where}: {prefix.rstrip('.') or 'the file'} must be a mapping of keys")
    seen = set()
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        key = f"{prefix}{key_node.value}"
        if not isinstance(key_node, yaml.ScalarNode) or key_node.value not in known:
            choices = ", ".join(f"{prefix}{name}" for name in known)
            raise ConfigError(f"{where}: {key} is not a setting; there are {choices}")
        if key in seen:
            raise ConfigError(f"{where}: {key} stands here for the second time")
        seen.add(key)
        rule = known[key_node.value]
        if isinstance(rule, dict):
            yield from _settings(path, value_node, f"{key}.", rule)
        else:
            name, check = rule
            yield name, _checked(path, key, value_node, check)


def _checked(path: Path, key: str, node: yaml.Node, check: Callable[[Any], Any]) -> Any:
    where = f"{path}:{node.start_mark.line + 1}"
    try:
        return check(_construct(node))
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {key} cannot be read ({_problem(error)})") from error
    except _Fault as fault:
        raise ConfigError(f"{where}: {key} {fault}") from fault


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]


def _construct(node: yaml.Node) -> Any:
    constructor = yaml.SafeLoader("")
    return constructor.construct_object(node, deep=True)


def _one_of(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise _Fault(f"must be one of {', '.join(choices)}, not {value!r}")
        return str(value)

    return check


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise _Fault(f"must be a whole number from {low} to {high}, not {value!r}")
        return value

    return check


def _address(value: Any) -> str:
    try:
        return str(ipaddress.ip_address(value if isinstance(value, str) else ""))
    except ValueError:
        raise _Fault(f"must be an IP address in quotes, not {value!r}") from None


def _ppm(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1_000_000:
        raise _Fault(f"must be a number of ppm from 0 to 1000000, not {value!r}")
    return float(value)


def _path(value: Any) -> Path:
    if not isinstance(value, str) or not value:
        raise _Fault(f"must be a file's name, not {value!r}")
    return Path(value)


def _path_or_none(value: Any) -> Optional[Path]:
    return None if value is None else _path(value)


def _users(value: Any) -> dict[str, str]:
    """Hashes as htpasswd -B and the exporter toolkit's documentation make them."""
    is_mapping = isinstance(value, dict) and bool(value)
    if not is_mapping or not all(isinstance(name, str) for name in value):
        raise _Fault("must be a mapping of names to bcrypt hashes")
    for name, hashed in value.items():
        if not isinstance(hashed, str) or not re.fullmatch(r"\$2[aby]\$\d\d\$[./\w]{53}", hashed):
            raise _Fault(
                f"of {name} must be a bcrypt hash: make one with 'htpasswd -nBC 10 {name}'"
            )
    return dict(value)


_WEB_KEYS: dict[str, Any] = {
    "tls_server_config": {
        "cert_file": ("cert_file", _path),
        "key_file": ("key_file", _path),
        "client_ca_file": ("client_ca_file", _path),
        "client_auth_type": ("client_auth_type", _one_of(*CLIENT_AUTH_TYPES)),
        "min_version": ("min_version", _one_of(*MIN_VERSIONS)),
    },
    "basic_auth_users": ("users", _users),
}

_KEYS: dict[str, Any] = {
    "source": ("source", _one_of(*get_args(SourceName))),
    "listen": {
        "address": ("address", _address),
        "port": ("port", _whole(0, 65535)),
        "web_config": ("web_config", _path_or_none),
    },
    "tolerance_ppm": {kind: (kind, _ppm) for kind in TOLERATED},
    "limits": {
        "vms": ("max_vms", _whole(1, 1_000_000)),
        "vcpus": ("max_vcpus", _whole(1, 1_000_000)),
    },
    "log_format": ("log_format", _one_of(*get_args(LogFormat))),
}
