"""Builds the container image from the Debian package: ``make image``.

mmdebstrap makes the root file system from Debian's packages, and this program writes it as an OCI
image layout (the OCI image specification) into a tar file.  Neither a daemon nor a registry takes
part.  With one state of Debian's archive, one package and one ``SOURCE_DATE_EPOCH``, each build
yields the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from argparse import ArgumentParser
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

SUITE = "trixie"
_PACKAGES = "python3,python3-prometheus-client,python3-yaml"
_LEFT_OUT = ("/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/doc/*")
_KEPT = "/usr/share/doc/*/copyright"
_OCI = "application/vnd.oci.image"
_HEALTH = (
    "import urllib.request as r; r.urlopen('http://127.0.0.1:9978/healthz', timeout=5).close()"
)


def root_file_system(package: Path, output: Path) -> None:
    """Write Debian's essential packages, Python and the package into a sorted tar file.

    bcc is left out, and with it LLVM: the package has the bytecode of its BPF programs.

    :raises CalledProcessError: mmdebstrap failed.
    """
    options = [f"--dpkgopt=path-exclude={path}" for path in _LEFT_OUT]
    install = f'dpkg --root="$1" --install {package}'
    forget_builder = 'rm "$1/etc/hostname" "$1/etc/resolv.conf"'
    subprocess.run(
        [
            *("mmdebstrap", "--quiet", "--variant=essential", f"--include={_PACKAGES}"),
            *(*options, f"--dpkgopt=path-include={_KEPT}", f"--customize-hook={install}"),
            *(f"--customize-hook={forget_builder}", SUITE, str(output)),
        ],
        check=True,
        stdout=sys.stderr,
    )


def configuration(created: str, diff_id: str, version: str, revision: str) -> dict[str, Any]:
    """Return the image's configuration.

    :param created: the time of creation (RFC 3339).
    :param diff_id: the digest of the uncompressed layer.
    """
    labels = {
        "title": "tscwatch",
        "description": "Shows when the vCPUs of a KVM guest disagree about time",
        "version": version,
        "revision": revision,
        "created": created,
        "licenses": "Apache-2.0",
    }
    return {
        "created": created,
        "architecture": "amd64",
        "os": "linux",
        "config": {
            # Only root may use tracefs; what root may do is up to the capabilities.
            "User": "0:0",
            "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE=1"],
            "Entrypoint": ["/usr/bin/tscwatch"],
            "Cmd": ["run", "--config", "/etc/tscwatch/tscwatch.yaml"],
            "ExposedPorts": {"9978/tcp": {}},
            "StopSignal": "SIGTERM",
            "Labels": {f"org.opencontainers.image.{key}": text for key, text in labels.items()},
            # Not part of the OCI specification, but docker uses it.
            "Healthcheck": {"Test": ["CMD", "/usr/bin/python3", "-c", _HEALTH]},
        },
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created": created, "created_by": "make image"}],
    }


def layout(root: bytes, version: str, revision: str, epoch: int) -> dict[str, bytes]:
    """Return the files of the image layout, by path.

    :param root: the root file system, as a tar file.
    :param epoch: the time of creation (Unix time).
    """
    files = {"oci-layout": _json({"imageLayoutVersion": "1.0.0"})}

    def blob(content: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        files[f"blobs/sha256/{digest}"] = content
        return {
            "mediaType": f"{_OCI}.{kind}",
            "digest": f"sha256:{digest}",
            "size": len(content),
        }

    created = datetime.fromtimestamp(epoch, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    diff_id = f"sha256:{hashlib.sha256(root).hexdigest()}"
    config = configuration(created, diff_id, version, revision)
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_OCI}.manifest.v1+json",
        "config": blob(_json(config), "config.v1+json"),
        "layers": [blob(gzip.compress(root, 9, mtime=0), "layer.v1.tar+gzip")],
    }
    entry = {
        **blob(_json(manifest), "manifest.v1+json"),
        "platform": {"architecture": "amd64", "os": "linux"},
        "annotations": {
            "org.opencontainers.image.ref.name": version,
            "io.containerd.image.name": f"docker.io/library/tscwatch:{version}",
        },
    }
    files["index.json"] = _json({"schemaVersion": 2, "manifests": [entry]})
    return files


def _json(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def write_archive(files: dict[str, bytes], epoch: int, output: Path) -> None:
    """Write a tar file with these files, by path, in the order of their paths."""
    with tarfile.open(output, "w") as archive:
        for path, content in sorted(files.items()):
            member = tarfile.TarInfo(path)
            member.size, member.mtime = len(content), epoch
            archive.addfile(member, io.BytesIO(content))


def main() -> None:
    """Build the image, and print its size."""
    parser = ArgumentParser()
    parser.add_argument("--revision", default="", help="the commit, for the image's label")
    parser.add_argument("package", type=Path)
    parser.add_argument("version")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    epoch = int(os.environ["SOURCE_DATE_EPOCH"])
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "root.tar"
        root_file_system(arguments.package, root)
        files = layout(root.read_bytes(), arguments.version, arguments.revision, epoch)
    write_archive(files, epoch, arguments.output)
    size = sum(map(len, files.values())) / 1e6
    print(f"{arguments.output}: {size:.1f} MB compressed")


if __name__ == "__main__":
    main()
