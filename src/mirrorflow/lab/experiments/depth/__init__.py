"""Figures 7 and 8: sparse regression at growing depth."""
