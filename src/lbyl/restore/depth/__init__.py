"""Restoration of dropped blocks by the layer before them."""
