"""Compresses a folder of a language model into another folder, one decoder layer at a time."""
