"""The keeper: the parent of every program. It holds; the supervisor decides. It imports nothing of procman but
errors."""
