"""Drops whole residual blocks for a budget, alone or together with widths."""
