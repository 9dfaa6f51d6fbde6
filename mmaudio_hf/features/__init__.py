"""Frozen encoders, and extraction of their features from media."""
