"""The benchmark: procman beside its peers on the same work. `python -m tests.bench --help`; docs/performance.md."""
