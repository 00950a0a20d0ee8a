"""Prefect tasks: thin wrappers around functions of `errata` and `registry`, one module per stage."""
