"""The kernel's interfaces.  Nothing here depends on a VM or on what tscwatch makes of it."""
