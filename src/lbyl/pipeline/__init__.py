"""The steps of a compression in their order, from a model to a smaller one."""
