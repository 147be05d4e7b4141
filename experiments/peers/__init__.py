"""What else people could use: each peer as a small class in a registry, and the comparison with plans."""
