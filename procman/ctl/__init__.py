"""procmanctl: looks at a running daemon and operates it, over its socket. It draws; the daemon does the work."""
