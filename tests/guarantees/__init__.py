"""The long forms of the tests of docs/guarantees.md: each module is run as `python -m tests.guarantees NAME`."""
