"""The table of results: one row a figure; comparison, verdict and plot read nothing else."""
