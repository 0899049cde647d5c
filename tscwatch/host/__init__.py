"""The state of this host: its VMs and its TSC."""
