"""Engines of a sweep: processes on this machine, a Ray cluster, SLURM."""
