"""One file an analysis; importing it registers it."""
