"""Experiments: one folder a subject, in it one file for each figure, table or study."""
