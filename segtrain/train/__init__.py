"""Training: one loop, its state, what it saves and what it says."""
