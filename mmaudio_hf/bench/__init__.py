"""Benchmarks, one module each; `mmaudio-hf bench` runs them."""
