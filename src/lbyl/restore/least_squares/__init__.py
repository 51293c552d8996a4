"""Restoration by least squares on measured second moments."""
