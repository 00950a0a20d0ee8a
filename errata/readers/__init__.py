"""Reading edits in the forms they come in."""
