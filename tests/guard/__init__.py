"""What procman does, counted: a guard against work that creeps in. See docs/performance.md."""
