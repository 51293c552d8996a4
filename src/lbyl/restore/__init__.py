"""Restoration: methods by which kept channels compensate for dropped ones, one file for each."""
