"""Drops whole residual blocks for a budget."""
