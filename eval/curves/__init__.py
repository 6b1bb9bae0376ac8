"""Curves over training of several runs: groups of seeds, bands, claims, pictures, reports."""
