"""Durable memory: commit log, object store, MLflow model registry."""
