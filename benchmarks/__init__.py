"""Benchmarks: figures are ratios from one run, because machines are shared and noisy."""
