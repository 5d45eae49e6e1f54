"""The request-loss harness: a load client that misses nothing, and what a site goes through meanwhile.

`tally` what is counted · `client` who asks · `load` the client in a process of its own, for a `with` · `servers` the
real servers · `nginx` a real nginx before them · `scenarios` what is done to them · `python -m tests.loss --help`.
"""
