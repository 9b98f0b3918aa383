"""Benchmarks of every part on this machine."""
