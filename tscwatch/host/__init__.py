"""What is on this host: its VMs, and its TSC."""
