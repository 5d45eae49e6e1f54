"""procman: a process manager for Python web servers that its own failures never reach."""

__version__ = "0.1.0"
