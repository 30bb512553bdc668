"""Facts that need no experiment: arithmetic, equivalences and published problems solved again. One file a subject."""
