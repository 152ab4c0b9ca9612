"""Verbs that answer in the terminal: chat, generate and run; and the line that is typed there."""
