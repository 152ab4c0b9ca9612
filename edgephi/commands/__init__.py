"""The `edgephi` command, one verb per file; verbs that are spoken of together are in one folder."""
