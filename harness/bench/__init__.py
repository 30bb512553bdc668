"""What the methods cost: measurements of time and memory, beside other implementations."""
