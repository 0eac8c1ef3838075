"""Eight benchmarks by lighteval and their mean, TEST."""
