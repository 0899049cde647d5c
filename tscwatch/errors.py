"""The errors that an operator can encounter, each with an exit status of its own.

TscwatchError
 ├── ConfigError        2   the configuration file or the command line is wrong
 ├── NotRoot            3   the user is not root
 ├── BccMissing         4   bcc, a package of the distribution, cannot be imported
 ├── HeadersMissing     5   bcc has no kernel headers to compile with
 ├── KernelUnfit        6   the kernel has no kprobes or no BTF, or refused a probe
 ├── TracefsMissing     7   tracefs is not mounted
 ├── KvmMissing         8   there is no /dev/kvm, and no kvm module that could be loaded later
 ├── ListenFailed       9   the address or port cannot be bound
 ├── RecordingError    10   a recording cannot be read or written
 ├── NoSource          11   with ``source: auto``, no source works
 ├── DaemonSilent      12   no running tscwatch answers ``tscwatch top``
 └── NamespaceUnfit    13   the process namespace is not the host's
"""

from __future__ import annotations


class TscwatchError(Exception):
    """An error for the operator; its message is one sentence that also names the fix."""

    exit_status = 1


class ConfigError(TscwatchError):
    """The configuration cannot be used; the message names the file, and key and line if any."""

    exit_status = 2


class NotRoot(TscwatchError):
    """The process may not use BPF or tracefs."""

    exit_status = 3


class BccMissing(TscwatchError):
    """The running Python interpreter cannot import bcc."""

    exit_status = 4


class HeadersMissing(TscwatchError):
    """There are no kernel headers of this architecture, which bcc needs to compile."""

    exit_status = 5


class KernelUnfit(TscwatchError):
    """The running kernel lacks, or refuses, what a source needs."""

    exit_status = 6


class TracefsMissing(TscwatchError):
    """tracefs is not mounted."""

    exit_status = 7


class KvmMissing(TscwatchError):
    """The running kernel has no KVM, and no kvm module that could be loaded later."""

    exit_status = 8


class ListenFailed(TscwatchError):
    """The address or port of the HTTP server cannot be bound."""

    exit_status = 9


class RecordingError(TscwatchError):
    """A recording cannot be read or written; the message names the file, and the line if any."""

    exit_status = 10


class NoSource(TscwatchError):
    """No source works on this host; the message has the reason of each."""

    exit_status = 11


class DaemonSilent(TscwatchError):
    """No running tscwatch answers at the address."""

    exit_status = 12


class NamespaceUnfit(TscwatchError):
    """The process namespace is not the host's, so that ``/proc`` does not show the VMs."""

    exit_status = 13
