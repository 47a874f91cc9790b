"""Prefect flows and the command line of rdd-maps; thin edges round :mod:`rdd_pipeline`."""
