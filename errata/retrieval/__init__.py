"""Finding the nearest of many stored vectors."""
