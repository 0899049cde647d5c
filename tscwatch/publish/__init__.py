"""What tscwatch found, for people, Prometheus and systemd.  Nothing here reads the kernel."""
