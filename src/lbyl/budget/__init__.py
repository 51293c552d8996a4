"""Budgets: choose the number of channels that each group keeps."""
