"""Benchmarks, installed as turboserve.bench: every figure with its floor, its baseline and its machine."""
