"""The benchmark: procman beside Supervisor on the same work. `python -m tests.bench --help`; docs/performance.md."""
