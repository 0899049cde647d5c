"""The configuration: a YAML file in which every key is optional.

Each error names the file, the line and the key.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, Literal, NamedTuple, Optional, get_args

import yaml

from tscwatch.analysis.mismatch import DEFAULT_TOLERANCE, MISMATCHES
from tscwatch.errors import ConfigError
from tscwatch.model import SECONDS_A_DAY, Kind, PerVcpu, SourceName

LogFormat = Literal["text", "json"]


class Config(NamedTuple):
    """The settings, with their defaults."""

    source: SourceName = "auto"
    address: str = "127.0.0.1"
    port: int = 9978
    web_config: Optional[Path] = None
    tolerance: Mapping[Kind, float] = DEFAULT_TOLERANCE
    """By kind, in the kind's unit."""
    max_vms: int = 1024
    max_vcpus: int = 16384
    per_vcpu: PerVcpu = "differing"
    log_format: LogFormat = "text"


class BadValue(Exception):
    """A value cannot be used; the message follows the key's name, as in ``must be a number``."""


def load(path: Optional[Path]) -> Config:
    """Read a configuration file.

    :param path: None for the defaults.
    :raises ConfigError: it cannot be read or used.
    """
    if path is None:
        return Config()
    settings = dict(read_settings(path, _KEYS))
    tolerance = {kind: settings.pop(kind, default) for kind, default in DEFAULT_TOLERANCE.items()}
    return Config(tolerance=tolerance, **settings)


def read_settings(path: Path, known: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings in a YAML file, as pairs of name and value.

    :param known: for each key, the setting's name and the function that checks and converts its
        value, or a mapping of the same form for the keys below it.
    :raises ConfigError: the file cannot be read, or a key or a value is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not valid UTF-8") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: is not valid YAML ({_problem(error)})") from error
    if node is not None:  # None: the file has at most comments
        yield from _settings(path, node, "", known)


def _settings(
    path: Path, node: yaml.Node, prefix: str, known: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    position = f"{path}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{position}: {prefix.rstrip('.') or 'the file'} must be a mapping")
    seen = set()
    for key_node, value_node in node.value:
        position = f"{path}:{key_node.start_mark.line + 1}"
        key = f"{prefix}{key_node.value}"
        if not isinstance(key_node, yaml.ScalarNode) or key_node.value not in known:
            choices = ", ".join(f"{prefix}{name}" for name in known)
            raise ConfigError(f"{position}: {key} is not a setting; the settings are {choices}")
        if key in seen:
            raise ConfigError(f"{position}: {key} is set twice")
        seen.add(key)
        entry = known[key_node.value]
        if isinstance(entry, dict):
            yield from _settings(path, value_node, f"{key}.", entry)
        else:
            name, check = entry
            yield name, _checked(path, key, value_node, check)


def _checked(path: Path, key: str, node: yaml.Node, check: Callable[[Any], Any]) -> Any:
    position = f"{path}:{node.start_mark.line + 1}"
    try:
        return check(_construct(node))
    except yaml.YAMLError as error:
        raise ConfigError(f"{position}: {key} cannot be read ({_problem(error)})") from error
    except BadValue as error:
        raise ConfigError(f"{position}: {key} {error}") from error


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]


def _construct(node: yaml.Node) -> Any:
    constructor = yaml.SafeLoader("")
    return constructor.construct_object(node, deep=True)


def one_of(*choices: str) -> Callable[[Any], str]:
    """Return a check that accepts these values only."""

    def check(value: Any) -> str:
        if value not in choices:
            raise BadValue(f"must be one of {', '.join(choices)}, not {value!r}")
        return str(value)

    return check


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise BadValue(f"must be an integer from {low} to {high}, not {value!r}")
        return value

    return check


def _address(value: Any) -> str:
    try:
        return str(ipaddress.ip_address(value if isinstance(value, str) else ""))
    except ValueError:
        raise BadValue(f"must be an IP address in quotes, not {value!r}") from None


def _ppm(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1_000_000:
        raise BadValue(f"must be a number of ppm from 0 to 1000000, not {value!r}")
    return float(value)


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= SECONDS_A_DAY:
        raise BadValue(f"must be a number of seconds from 0 to {SECONDS_A_DAY}, not {value!r}")
    return float(value)


def file_path(value: Any) -> Path:
    """Return a value as a path.

    :raises BadValue: it is not a file name.
    """
    if not isinstance(value, str) or not value:
        raise BadValue(f"must be a file name, not {value!r}")
    return Path(value)


def _path_or_none(value: Any) -> Optional[Path]:
    return None if value is None else file_path(value)


def _tolerances_in(unit: str) -> Iterator[Kind]:
    return (kind for kind in DEFAULT_TOLERANCE if MISMATCHES[kind].unit == unit)


_KEYS: dict[str, Any] = {
    "source": ("source", one_of(*get_args(SourceName))),
    "listen": {
        "address": ("address", _address),
        "port": ("port", _integer(0, 65535)),
        "web_config": ("web_config", _path_or_none),
    },
    "tolerance_ppm": {kind: (kind, _ppm) for kind in _tolerances_in("ppm")},
    "tolerance_seconds": {kind: (kind, _seconds) for kind in _tolerances_in("seconds")},
    "limits": {
        "vms": ("max_vms", _integer(1, 1_000_000)),
        "vcpus": ("max_vcpus", _integer(1, 1_000_000)),
    },
    "metrics": {
        "per_vcpu": ("per_vcpu", one_of(*get_args(PerVcpu))),
    },
    "log_format": ("log_format", one_of(*get_args(LogFormat))),
}
