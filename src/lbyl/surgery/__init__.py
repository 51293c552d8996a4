"""Cut the tensors, mask what goes, and check that the cut network computes what the masked one does."""
