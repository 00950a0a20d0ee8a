"""Where bytes are kept: a local folder, an S3 bucket, or memory. See `registry.storage.base`."""
