"""The survey's claims, each an experiment with a verdict: the ledger, what it needs, what it says."""
