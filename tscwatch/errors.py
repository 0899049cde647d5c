"""What an operator can meet, each with one sentence and an exit status of its own.

TscwatchError
 ├── ConfigError        2   the configuration file or the command line
 ├── NotRoot            3   the kernel wants more privilege
 ├── BccMissing         4   the distribution's bcc package
 ├── HeadersMissing     5   bcc needs kernel headers of this architecture
 ├── KernelUnfit        6   no kprobes, no BTF, or the kernel refused a probe
 ├── TracefsMissing     7   tracefs is not mounted
 ├── KvmMissing         8   no /dev/kvm and no kvm module to wait for
 ├── ListenFailed       9   the port is taken, or the address is not this host's
 ├── RecordingError    10   a recording is truncated, foreign or cannot be written
 ├── NoSource          11   ``source: auto`` found nothing that works
 └── DaemonSilent      12   no running tscwatch answers
"""

from __future__ import annotations


class TscwatchError(Exception):
    """An error for the operator: its text is one sentence that names the fix."""

    exit_status = 1


class ConfigError(TscwatchError):
    """A configuration that cannot be used; names file, key and line."""

    exit_status = 2


class NotRoot(TscwatchError):
    """The process may not use BPF or tracefs."""

    exit_status = 3


class BccMissing(TscwatchError):
    """The Python interpreter in use has no bcc."""

    exit_status = 4


class HeadersMissing(TscwatchError):
    """No kernel headers that bcc could compile with."""

    exit_status = 5


class KernelUnfit(TscwatchError):
    """The running kernel lacks what a source needs."""

    exit_status = 6


class TracefsMissing(TscwatchError):
    """tracefs is not mounted."""

    exit_status = 7


class KvmMissing(TscwatchError):
    """This kernel has no KVM, nor a module that could bring it."""

    exit_status = 8


class ListenFailed(TscwatchError):
    """The metrics address cannot be bound."""

    exit_status = 9


class RecordingError(TscwatchError):
    """A recording cannot be read or written; names file, line and reason."""

    exit_status = 10


class NoSource(TscwatchError):
    """No source works on this host; names each one's reason."""

    exit_status = 11


class DaemonSilent(TscwatchError):
    """The daemon that was asked does not answer."""

    exit_status = 12
