"""What several benchmarks need; none of them itself."""
