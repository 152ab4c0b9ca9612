"""Chat templates, rendered in a child process within bounds."""
