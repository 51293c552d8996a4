"""Files in and out: sources of models, saved folders, images, exports, reports."""
