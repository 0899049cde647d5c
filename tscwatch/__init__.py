"""Observes the TSC frequency ioctls of all KVM guests on a host."""

__version__ = "0.1.0"
