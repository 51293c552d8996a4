"""What the kept channels take over from the dropped ones: one file a method."""
