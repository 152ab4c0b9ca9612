"""The `edgephi` command, one verb per file."""
