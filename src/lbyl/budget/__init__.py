"""Budgets: how many channels each group keeps."""
