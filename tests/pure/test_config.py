"""Each error in a configuration names the file, the line and the key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tscwatch import config
from tscwatch.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "deploy" / "tscwatch.yaml"


def load(tmp_path: Path, text: str) -> config.Config:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return config.load(path)


def test_the_example_is_the_default() -> None:
    assert config.load(EXAMPLE) == config.load(None)


def test_a_partial_file_changes_only_what_it_names(tmp_path: Path) -> None:
    changed = load(tmp_path, "listen: {port: 1}\ntolerance_ppm:\n  vcpu_skew: 0.5\n")
    default = config.Config()
    assert changed == default._replace(port=1, tolerance={**default.tolerance, "vcpu_skew": 0.5})


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("\nsuorce: bcc\n", 2, "suorce"),
        ("listen:\n  prot: 1\n", 2, "listen.prot"),
        ("source: perf\n", 1, "source"),
        ("listen: {port: '80'}\n", 1, "listen.port"),
        ("listen: {port: true}\n", 1, "listen.port"),
        ("listen: {port: 65536}\n", 1, "listen.port"),
        ("listen: {address: localhost}\n", 1, "listen.address"),
        ("# x\ntolerance_ppm:\n  readback: -1\n", 3, "tolerance_ppm.readback"),
        ("tolerance_ppm: {readback: .nan}\n", 1, "tolerance_ppm.readback"),
        ("tolerance_ppm: {refused: 1}\n", 1, "tolerance_ppm.refused"),
        ("tolerance_ppm: {desync: 1}\n", 1, "tolerance_ppm.desync"),
        ("tolerance_seconds: {desync: -1}\n", 1, "tolerance_seconds.desync"),
        ("tolerance_seconds: {desync: true}\n", 1, "tolerance_seconds.desync"),
        ("tolerance_ppm: {changed: 1000001}\n", 1, "tolerance_ppm.changed"),
        ("tolerance_ppm: {changed: true}\n", 1, "tolerance_ppm.changed"),
        ("tolerance_seconds: {desync: 86401}\n", 1, "tolerance_seconds.desync"),
        ("listen: {port: -1}\n", 1, "listen.port"),
        ("listen: {address: 5}\n", 1, "listen.address must be an IP address in quotes, not 5"),
        ("listen: {web_config: ''}\n", 1, "listen.web_config must be a file name"),
        ("listen:\n  port: 1\n  port: 2\n", 3, "listen.port is set twice"),
        ("limits: {vms: 0}\n", 1, "limits.vms"),
        ("limits: {vms: 1000001}\n", 1, "limits.vms must be an integer from 1 to 1000000"),
        ("limits: {vcpus: 0}\n", 1, "limits.vcpus"),
        ("limits: {vcpus: 1000001}\n", 1, "limits.vcpus must be an integer from 1 to 1000000"),
        ("limits: {vcpus: 1.0}\n", 1, "limits.vcpus"),
        ("log_format: xml\n", 1, "log_format must be one of text, json, not 'xml'"),
        ("limits: 7\n", 1, "limits"),
        ("metrics: {per_vcpu: some}\n", 1, "metrics.per_vcpu"),
        ("metrics: {per_vcpu: [all]}\n", 1, "metrics.per_vcpu"),
        ("source: bcc\nsource: auto\n", 2, "source"),
        ("? [a]\n: 1\n", 1, ""),
        ("- source\n", 1, "the file"),
        ("source: [\n", 2, "not valid YAML"),
        ("source: !!python/object:os.system bcc\n", 1, "source"),
    ],
)
def test_an_error_names_the_file_the_line_and_the_key(
    tmp_path: Path, text: str, line: int, key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert re.search(rf"c\.yaml:{line}: ", message)
    assert key in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("source: ftrace", {"source": "ftrace"}),
        ("listen: {address: '2001:DB8::1', port: 0}", {"address": "2001:db8::1", "port": 0}),
        (
            "listen: {port: 65535, web_config: /w.yml}",
            {"port": 65535, "web_config": Path("/w.yml")},
        ),
        ("listen: {web_config: null}", {}),
        ("tolerance_ppm: {unscaled: 1000000}", {"tolerance": {"unscaled": 1_000_000.0}}),
        ("tolerance_seconds: {desync: 0}", {"tolerance": {"desync": 0.0}}),
        ("tolerance_seconds: {desync: 86400}", {"tolerance": {"desync": 86_400.0}}),
        ("limits: {vms: 1, vcpus: 1000000}", {"max_vms": 1, "max_vcpus": 1_000_000}),
        ("limits: {vms: 1000000, vcpus: 1}", {"max_vms": 1_000_000, "max_vcpus": 1}),
        ("metrics: {per_vcpu: none}\nlog_format: json", {"per_vcpu": "none", "log_format": "json"}),
        ("# nothing", {}),
    ],
)
def test_a_value_at_its_limit_is_taken(tmp_path: Path, text: str, changes: dict[str, Any]) -> None:
    default = config.Config()
    tolerance = {**default.tolerance, **changes.pop("tolerance", {})}
    assert load(tmp_path, f"{text}\n") == default._replace(tolerance=tolerance, **changes)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: cannot be read"):
        config.load(tmp_path / "missing.yaml")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_configuration_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(data)
    try:
        config.load(path)
    except ConfigError as error:
        assert str(path) in str(error)
