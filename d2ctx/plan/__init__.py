"""A rehearsal of a whole run in a minute: what it will need, and what would stop it."""
