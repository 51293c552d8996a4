"""Short implementations of other methods, after their papers, one file for each; benchmarks compare with them."""
