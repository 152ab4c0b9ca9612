"""Scripts that measure one thing each; docs/results.md names the commands."""
