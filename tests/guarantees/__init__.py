"""The long forms of the promises in docs/guarantees.md, one module each: `python -m tests.guarantees NAME`."""
