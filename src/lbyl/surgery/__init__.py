"""Surgery: cuts tensors, masks dropped channels, and verifies that cut and masked network compute the same."""
