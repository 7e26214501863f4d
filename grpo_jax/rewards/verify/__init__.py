"""Verification of answers: extraction from completions, equivalence, and grades by data set."""
