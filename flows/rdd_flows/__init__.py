"""Prefect flows and the command line of rdd-maps; thin edges round :mod:`rdd_pipeline`."""

from rdd_flows.settings import configure_prefect

configure_prefect()  # Prefect reads the environment when it is imported
