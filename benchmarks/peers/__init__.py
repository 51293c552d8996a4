"""Short implementations of other methods, after their papers, for the benchmarks."""
