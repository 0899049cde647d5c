"""Whose guest a VM is, as the platform that runs it names it.

Each platform leaves its names in another place:

* Nova: in the metadata of libvirt's domain (``LibvirtConfigGuestMetaNovaInstance``);
* KubeVirt: in the guest's name, ``NAMESPACE_VMI`` (``VMINamespaceKeyFunc``);
* Proxmox: in ``-id``, an option that only its QEMU has;
* Firecracker: in ``--id``, with or without its jailer.

A name with an underscore is no proof of KubeVirt.  It counts only if KubeVirt's metadata is in
libvirt's domain, or if KubeVirt is the guest's manufacturer in its SMBIOS.  libvirt's domain counts
only if it has the pid of the VM's process.  None of this is authenticated: whoever starts a VMM
chooses its command line.  Pure: :mod:`tscwatch.host.libvirt` reads libvirt's file.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from itertools import count
from typing import NamedTuple, Optional
from xml.parsers import expat

from tscwatch.model import Guest, Owner
from tscwatch.vmm import qemu_options

_MAX_LABEL = 200
_MAX_ELEMENTS = 4096  # up to the end of the metadata; libvirt writes some hundred
_NOVA = "http://openstack.org/xmlns/libvirt/nova/"
"""Followed by a version, 1.0 or 1.1."""
_KUBEVIRT = "http://kubevirt.io"
_METADATA = ("domstatus", "domain", "metadata")

_VMID = re.compile(r"[0-9]{1,9}")
_FIRECRACKER_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
_SMBIOS_OF_KUBEVIRT = re.compile(r"(^|,)(manufacturer|family)=KubeVirt(,|$)")
# Kubernetes allows no underscore in a name, so the only one separates the two.
_KUBEVIRT_NAME = re.compile(r"([a-z0-9][-a-z0-9]{0,62})_([a-z0-9][-.a-z0-9]{0,62})")


def of_guest(
    guest: Guest, arguments: Sequence[str], status: bytes = b"", pids: Container[str] = ()
) -> Optional[Owner]:
    """Return whose guest it is, None if no platform has left its mark.

    :param arguments: the VMM's command line after the executable.
    :param status: libvirt's status file of the domain of that name, or its beginning.
    :param pids: the pid of the VMM's process in each of its pid namespaces.
    """
    if guest.vmm == "firecracker":
        name = next(_ids(arguments), "")
        return Owner("firecracker", name=name) if _FIRECRACKER_ID.fullmatch(name) else None
    if guest.vmm != "qemu":
        return None
    if guest.vmid and _VMID.fullmatch(guest.vmid):
        return Owner("proxmox", name=guest.name or "", vmid=guest.vmid)
    domain = _parse(status)
    if domain.pid not in pids:
        domain = _Domain()
    if domain.name or domain.project:
        return Owner("openstack", "", domain.name, domain.project, flavor=domain.flavor)
    smbios = (value for option, value in qemu_options(arguments) if option == "smbios")
    is_kubevirt = domain.is_kubevirt or any(map(_SMBIOS_OF_KUBEVIRT.search, smbios))
    names = _KUBEVIRT_NAME.fullmatch(guest.name or "")
    return Owner("kubevirt", names[1], names[2]) if is_kubevirt and names else None


def _ids(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the values of Firecracker's option ``--id``; an ``=`` may separate the two."""
    for argument, following in zip(arguments, (*arguments[1:], "")):
        name, equals, value = argument.partition("=")
        if name in ("-id", "--id"):
            yield value if equals else following


class _Domain(NamedTuple):
    """What a status file shows."""

    pid: str = ""
    is_kubevirt: bool = False
    name: str = ""
    """Nova's display name."""
    project: str = ""
    """Nova's project: its name, else its id."""
    flavor: str = ""
    """Nova's flavor."""


def _parse(status: bytes) -> _Domain:
    """Parse a status file up to the domain's metadata; return nothing if it is not well-formed.

    No content of a bounded size takes long: a document type is refused, so that no entity expands,
    the number of elements is bounded, and namespaces are read here and not by expat, which would
    copy their names at each element.
    """
    path: list[str] = []
    elements = count()
    found: dict[tuple[str, ...], str] = {}
    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True

    def start(tag: str, attributes: dict[str, str]) -> None:
        prefix, _, element = tag.rpartition(":")
        if len(path) == len(_METADATA):
            namespace = attributes.get(f"xmlns:{prefix}" if prefix else "xmlns", "")
            element = _NOVA if namespace.startswith(_NOVA) else namespace
        path.append(element)
        if next(elements) >= _MAX_ELEMENTS:
            raise ValueError("too many elements")
        place = tuple(path)
        if place in (_PID, _IS_KUBEVIRT, _NAME, _PROJECT):
            found.setdefault(place, attributes.get("pid", "") if place == _PID else "")
        if place == _PROJECT:
            found.setdefault(_PROJECT_ID, attributes.get("uuid", ""))
        if place == _FLAVOR:
            found.setdefault(_FLAVOR, attributes.get("name", ""))

    def end(_tag: str) -> None:
        if tuple(path) == _METADATA:
            parser.StartElementHandler = parser.EndElementHandler = None
            parser.CharacterDataHandler = None
        path.pop()

    def text(content: str) -> None:
        place = tuple(path)
        if place in (_NAME, _PROJECT):
            found[place] += content

    def refuse(*_declaration: object) -> None:
        raise ValueError("a document type")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = text, refuse
    try:
        parser.Parse(status)
    except (expat.ExpatError, ValueError):
        return _Domain()
    return _Domain(
        found.get(_PID, ""),
        _IS_KUBEVIRT in found,
        _label(found.get(_NAME, "")),
        _label(found.get(_PROJECT, "")) or _label(found.get(_PROJECT_ID, "")),
        _label(found.get(_FLAVOR, "")),
    )


_PID = _METADATA[:1]
_IS_KUBEVIRT = (*_METADATA, _KUBEVIRT)
_NAME = (*_METADATA, _NOVA, "name")
_PROJECT = (*_METADATA, _NOVA, "owner", "project")
_PROJECT_ID = (*_PROJECT, "uuid")
_FLAVOR = (*_METADATA, _NOVA, "flavor")


def _label(text: str) -> str:
    return " ".join(text.split())[:_MAX_LABEL]
