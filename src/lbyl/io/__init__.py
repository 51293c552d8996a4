"""Reads and writes files: sources of models, saved folders, images, texts, exports, reports."""
