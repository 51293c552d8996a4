"""Run, copy, observe and time a user's model, and leave it unchanged."""
