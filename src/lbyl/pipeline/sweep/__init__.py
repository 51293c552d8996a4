"""Compresses one network to several budgets, in one folder."""
