"""Benchmarks of natsfs beside others that do the same work: `./dev bench`."""
