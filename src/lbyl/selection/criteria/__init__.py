"""Criteria, which score channels: one small class for each.

A criterion is anything with a ``score`` method. Pass an instance to :func:`lbyl.compress`, give it a name with
:func:`lbyl.register`, or add a file here and its names to `lbyl._public`.
"""
