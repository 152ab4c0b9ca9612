"""Where each byte of a bundle's data file goes, and what happens to a weight on its way there."""
