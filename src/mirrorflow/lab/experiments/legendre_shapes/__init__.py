"""Figures 9, 11 and 14: shapes of R_a as decay accumulates."""
