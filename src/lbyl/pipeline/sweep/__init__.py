"""Several budgets of one network in one folder."""
