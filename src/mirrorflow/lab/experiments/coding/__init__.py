"""Figures 10 and 12: sparse coding of images."""
