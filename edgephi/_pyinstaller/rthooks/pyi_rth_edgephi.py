"""Runs in a frozen program before the program itself does."""

import edgephi

edgephi.freeze_support()
