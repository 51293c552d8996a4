"""Who calls whom: from a model to a smaller one."""
