"""The services of a team on one machine, without containers: ``rdd stack up``.

PostgreSQL, Redis, the Prefect server and its background services, a Prefect worker, a Dask
scheduler with workers, and an object store, each a process of its own that goes on when the command
has ended. ``docker-compose.yml`` runs the same in containers.

Nothing is imported here, so that a container's health check starts quickly.
"""
