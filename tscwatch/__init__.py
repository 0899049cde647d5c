"""tscwatch: watches the TSC frequency calls of every KVM guest on a host."""

__version__ = "0.1.0"
