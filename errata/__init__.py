"""Errata's domain: edits, editors, evaluation, monitors. Knows nothing of Prefect, MLflow or S3."""
