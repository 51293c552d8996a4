"""The steps in their order: from a model to a smaller one."""
