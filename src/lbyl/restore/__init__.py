"""How the kept channels make up for the dropped ones: one file for each method."""
